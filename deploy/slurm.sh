#!/usr/bin/env bash
# vidshard on Slurm: a Ray cluster on the nodes of the job, and one command on it.
#
#   sbatch --nodes=4 --gpus-per-node=8 slurm.sh tokenize s3://bucket/videos --out s3://bucket/tokens
#
# As an array, each task with an output of its own; %a in an argument becomes the number of the task:
#
#   sbatch --array=0-29 slurm.sh tokenize manifests/%a.parquet --out s3://bucket/tokens/%a
#
# vidshard and ray must be on PATH of every node, so activate the environment before sbatch. Before its time limit, and
# when it is preempted, the command commits what it has finished, and the job is queued again and continues there.
# Environment: VIDSHARD_HEAD_IP and VIDSHARD_RAY_PORT, if the first address of the head or port 6379 are not to be used.
#
#SBATCH --job-name=vidshard
#SBATCH --output=vidshard-%j.log
#SBATCH --open-mode=append
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --requeue
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

# shellcheck disable=SC2016  # expanded on the head node
run='vidshard "$@" & echo $! >"$VIDSHARD_STATE/pid"
     code=0; wait $! || code=$?
     echo $code >"$VIDSHARD_STATE/code"; exit $code'
# --wait: nodes without the command do not outlive it by Ray's own minute.
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --wait=20 \
    ray symmetric-run --address "$RAY_ADDRESS" --min-nodes "$SLURM_JOB_NUM_NODES" -- \
    bash -c "$run" vidshard "${arguments[@]}" &
step=$!
while true; do
    code=0
    wait "$step" || code=$?
    kill -0 "$step" 2>/dev/null || break # else a signal ended the wait, not the step
done
if [[ -s $VIDSHARD_STATE/code ]]; then
    code=$(<"$VIDSHARD_STATE/code")
fi
echo "vidshard ended with $code"
if [[ $code == 143 ]]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
