const strength = document.getElementById("strength");
strength.hidden = false;
strength.addEventListener("input", () => {
  document.getElementById("stage").style.setProperty("--strength", strength.value / 100);
});
