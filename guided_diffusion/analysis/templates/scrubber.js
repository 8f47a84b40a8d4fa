for (const root of document.querySelectorAll(".scrubber")) {
  const data = JSON.parse(root.querySelector("script[type='application/json']").textContent);
  const control = name => root.querySelector(`[name=${name}]`);
  const canvas = (name, width, height) => {
    const found = root.querySelector(`canvas[data-of=${name}]`);
    found.width = width; found.height = height;
    return found.getContext("2d");
  };
  const options = (name, texts) => control(name).append(...texts.map((text, i) => new Option(text, i)));
  options("sample", data.samples.map(sample => sample.index));
  options("block", data.blocks.map(block => `${block.name} (${block.map.join("×")})`));
  control("block").value = data.block;
  control("step").max = data.steps.length - 1;
  control("step").value = data.step;
  control("psi").max = data.largest;
  control("psi").value = data.psi;
  const loaded = {};
  const picture = source => loaded[source] ??= new Promise(done => {
    const image = new Image(); image.onload = () => done(image); image.src = source;
  });
  let newest = 0;
  const draw = async () => {
    const turn = ++newest, psi = Number(control("psi").value), place = Number(control("block").value);
    const step = data.steps[control("step").value], [rows, columns] = data.blocks[place].map;
    const look = data.samples[control("sample").value].looks[control("step").value], block = look.blocks[place];
    const score = Uint8Array.from(atob(block.score), letter => letter.charCodeAt(0));
    const images = await Promise.all([picture(look.x0), picture(look.blurred)]);
    if (turn !== newest) return;
    const [x0, blurred] = images, [width, height] = [x0.naturalWidth, x0.naturalHeight];
    const paint = (name, colour) => {
      const context = canvas(name, columns, rows), pixels = context.createImageData(columns, rows);
      score.forEach((value, i) => pixels.data.set([...colour(value), 255], 4 * i));
      context.putImageData(pixels, 0, 0);
    };
    paint("score", value => data.palette[value]);
    paint("mask", value => value > psi ? [255, 255, 255] : [0, 0, 0]);
    canvas("x0", width, height).drawImage(x0, 0, 0);
    const degraded = canvas("degraded", width, height), across = width / columns, down = height / rows;
    degraded.drawImage(x0, 0, 0);
    score.forEach((value, i) => {
      if (value <= psi) return;
      const cell = [(i % columns) * across, Math.floor(i / columns) * down, across, down];
      degraded.drawImage(blurred, ...cell, ...cell);
    });
    root.querySelector("img[data-of=delta]").src = block.delta;
    const share = score.filter(value => value > psi).length / score.length;
    control("at").value = `t = ${step} of ${data.of}`;
    control("threshold").value = (psi / data.quanta).toFixed(2);
    control("said").value = `share covered ${(100 * share).toFixed(1)} %, change ‖Δ‖/‖ε‖ ` +
      `${(100 * block.change).toFixed(2)} % (ψ = ${data.psi / data.quanta}, σ = ${data.sigma})`;
    root.dataset.drawn = turn;
  };
  for (const name of ["sample", "block", "step", "psi"]) control(name).addEventListener("input", draw);
  draw();
}
