// All of it, in the order of the page.

summary();
modules();
compare();
drawn.push(() => { if (byId("detail").open) { fillDetail(); drawSpectra(); } });
byId("detail").addEventListener("click", event => { if (event.target === byId("detail")) byId("detail").close(); });
window.addEventListener("resize", () => drawSpectra());
