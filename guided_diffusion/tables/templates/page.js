for (const slider of document.querySelectorAll(".slider")) {
  const over = slider.querySelector(".over");
  const move = () => { over.style.width = slider.querySelector("input").value + "%"; };
  slider.querySelector("input").addEventListener("input", move);
  move();
}
