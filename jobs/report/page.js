"use strict";
for (const card of document.querySelectorAll(".card")) {
  const videos = [...card.querySelectorAll("video")];
  for (const video of videos) video.controls = false;
  const start = () => videos.forEach((video) => { video.currentTime = 0; video.play().catch(() => {}); });
  const stop = () => videos.forEach((video) => video.pause());
  const box = card.querySelector(".videos");
  box.addEventListener("pointerenter", (event) => { if (event.pointerType === "mouse") start(); });
  box.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") stop(); });
  box.addEventListener("click", () => (videos.some((video) => !video.paused) ? stop() : start()));
}
