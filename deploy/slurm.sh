#!/usr/bin/env bash
# vidshard on Slurm: a Ray cluster on the nodes of the job, and one command on it.
#
#   sbatch --nodes=4 --gpus-per-node=8 slurm.sh tokenize s3://bucket/videos --out s3://bucket/tokens
#
# As an array, each task with an output of its own; %a in an argument becomes the number of the task:
#
#   sbatch --array=0-29 slurm.sh tokenize manifests/%a.parquet --out s3://bucket/tokens/%a
#
# vidshard and ray must be on PATH of every node, so activate the environment before sbatch. Two minutes before its time
# limit the command commits what it has finished, and the job is queued again and continues there. When it is preempted
# too, if the cluster has PreemptParameters=send_user_signal; else Slurm ends the job with GraceTime or at once, and it
# continues from what was committed (--commit-minutes).
# A node that is lost costs its work in flight; the job goes on with the others. Without the first node it starts again.
# Environment: VIDSHARD_HEAD_IP and VIDSHARD_RAY_PORT, if the first address of the head or port 6379 are not to be used;
# VIDSHARD_RESTARTS, how often a job is queued again after a failure that may pass (5).
#
#SBATCH --job-name=vidshard
#SBATCH --output=vidshard-%j.log
#SBATCH --open-mode=append
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --no-kill
#SBATCH --signal=B:TERM@120

set -euo pipefail

if [[ $# == 0 ]]; then
    echo "usage: sbatch [OPTIONS] $0 COMMAND..., such as: tokenize videos/ --out tokens/" >&2
    exit 2
fi
arguments=()
for argument in "$@"; do
    arguments+=("${argument//%a/${SLURM_ARRAY_TASK_ID:-%a}}")
done

# This script runs on the first node, where symmetric-run starts the head and the command.
head_ip=${VIDSHARD_HEAD_IP:-$(hostname --all-ip-addresses | cut --delimiter=' ' --fields=1)}
export RAY_ADDRESS=$head_ip:${VIDSHARD_RAY_PORT:-6379}
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=${RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT:-300}
# Ray asks every connection for this token; nodes that make one each would refuse each other.
RAY_AUTH_TOKEN=$(od --address-radix=n --read-bytes=32 --format=x1 /dev/urandom | tr --delete ' \n')
export RAY_AUTH_TOKEN RAY_AUTH_MODE=token
VIDSHARD_STATE=$(mktemp --directory)
export VIDSHARD_STATE
trap 'rm --recursive --force "$VIDSHARD_STATE"' EXIT

# Slurm signals this script alone. It passes the signal to the command, not to Ray, which would end at once.
# shellcheck disable=SC2329  # called by the trap
stop() {
    echo "signal from Slurm: finishing what is begun"
    if [[ -s $VIDSHARD_STATE/pid ]]; then
        kill -TERM "$(<"$VIDSHARD_STATE/pid")" || true
    else
        kill -TERM "$step" || true
    fi
}
trap stop TERM

# A trap that does nothing keeps this shell, where a signal reaches all processes of the step, and not the command.
# shellcheck disable=SC2016  # expanded on the head node
run='trap : TERM
     vidshard "$@" & command=$!
     echo $command >"$VIDSHARD_STATE/pid"
     code=0; wait $command || code=$?
     while kill -0 $command 2>/dev/null; do code=0; wait $command || code=$?; done
     echo $code >"$VIDSHARD_STATE/code"; exit $code'
# --no-kill, --wait=0 and --kill-on-bad-exit=0: the step outlives a node, and a task that ends early
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --no-kill --wait=0 --kill-on-bad-exit=0 \
    ray symmetric-run --address "$RAY_ADDRESS" --min-nodes "$SLURM_JOB_NUM_NODES" -- \
    bash -c "$run" vidshard "${arguments[@]}" &
step=$!
# The step ends with the command: other nodes would wait for a minute, and lost ones for ever. `sleep` is waited for in
# the background, as a trap runs only then.
left=30
while kill -0 "$step" 2>/dev/null && ((left > 0)); do
    sleep 1 &
    wait $! || true
    if [[ -s $VIDSHARD_STATE/code ]]; then
        left=$((left - 1))
    fi
done
by_signal=143 # the step's exit code if a signal ended it
if kill -TERM "$step" 2>/dev/null; then
    by_signal="" # it was this one
fi
ended=0
wait "$step" || ended=$?

# Without a code the step was ended, or its first node lost.
code=75
if [[ -s $VIDSHARD_STATE/code ]]; then
    code=$(<"$VIDSHARD_STATE/code")
    if [[ $code == 1 && $ended == "$by_signal" ]]; then
        code=75 # the signal ended Ray too, which may end the command with 1
    fi
elif [[ $ended == 126 || $ended == 127 ]]; then
    code=$ended
    echo "ray cannot be started on the nodes: activate the environment before sbatch"
elif [[ ! -s $VIDSHARD_STATE/pid ]]; then
    echo "the cluster did not come up: do all nodes reach $RAY_ADDRESS?"
fi
echo "vidshard ended with $code"
# docs/deploying.md has the exit codes: 143 and 129 were asked to end, 75 and 137 may pass, and others are for a person.
case $code in
    143 | 129) again=1 ;;
    75 | 137) again=$((${SLURM_RESTART_COUNT:-0} < ${VIDSHARD_RESTARTS:-5})) ;;
    *) again=0 ;;
esac
if ((again)); then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
