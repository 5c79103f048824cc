// The controls, and the page's beginning.

function go(step) {
  state.step = clamp(step, 0, data.steps.length - 1);
  if (playing && state.step === data.steps.length - 1) play(false);
  changed();
}

function play(on) {
  clearInterval(playing);
  if (on && state.step === data.steps.length - 1) state.step = 0;
  playing = on ? setInterval(() => go(state.step + 1), data.steps.length > 40 ? 350 : 1100) : 0;
  changed();
}

function changed() {
  const hash = `#step=${state.step + 1}&layer=${state.layer}&head=${state.head}`;
  try {
    history.replaceState(null, "", hash);
  } catch {
    /* some browsers refuse on file://; only the address stays behind */
  }
  show();
}

/** #step=4&layer=3&head=2: what is missing or not on the page stays as it is. */
function readHash() {
  const wanted = new URLSearchParams(location.hash.slice(1)),
    number = (name) => (/^\d{1,6}$/.test(wanted.get(name) ?? "") ? Number(wanted.get(name)) : null);
  const layer = number("layer"),
    head = number("head"),
    step = number("step");
  if (step !== null) state.step = clamp(step - 1, 0, data.steps.length - 1);
  if (data.kept_layers.some((each) => each.layer === layer)) state.layer = layer;
  if (data.kept_heads.includes(head)) state.head = head;
}

function build() {
  document.title = `${data.title} · kvik trace`;
  by("about").textContent =
    `${data.model} · ${plural(data.layers, "layer")} of ${plural(data.heads, "query head")} over ${plural(data.lanes, "lane")} · weights ${data.weights} · cache ${data.spec} · ${plural(count, "token")}`;
  by("slider").max = data.steps.length;
  by("layer").replaceChildren(
    ...data.kept_layers.map((each) => {
      const option = make("option", "", each.layer);
      option.value = each.layer;
      return option;
    }),
  );
  by("layer").disabled = data.kept_layers.length === 1;
  for (const lane of data.kept_lanes) {
    const group = make("span", "lane");
    group.dataset.lane = lane;
    group.title = `lane ${lane}`;
    for (const head of data.kept_heads.filter((each) => laneOf(each) === lane)) {
      const item = make("label"),
        input = make("input");
      Object.assign(input, { type: "radio", name: "head", value: head });
      item.append(input, make("span", "", head));
      group.append(item);
    }
    by("heads").append(group);
  }
  by("drawn").textContent =
    (data.rotated
      ? "q and k are drawn as they meet: turned by their position (RoPE), the two channels of a pair side by side. "
      : "") +
    "k and v are drawn as the cache holds them, rounded to its precision." +
    (data.hides
      ? ` Without a cache there is ${data.hides}, and all pairs are computed; the colours are this cache's numbers where it has them.`
      : "");
  const some = data.kept_layers.length < data.layers,
    one = data.kept_heads.length < data.heads;
  by("embedded").textContent = one
    ? `To stay small, this page holds layer ${data.layer}, head ${data.head} alone; --layer and --head choose others.`
    : some
      ? `To stay small, this page holds layer ${data.kept_layers.map((each) => each.layer).join(", ")} alone, all its heads; --layer chooses another.`
      : "This page holds all layers and heads. Numbers are given to three digits.";
}

function listen() {
  for (const [id, step] of [
    ["first", () => 0],
    ["back", () => state.step - 1],
    ["forward", () => state.step + 1],
    ["last", () => data.steps.length - 1],
  ])
    by(id).addEventListener("click", () => go(step()));
  by("play").addEventListener("click", () => play(!playing));
  by("slider").addEventListener("input", () => go(Number(by("slider").value) - 1));
  by("layer").addEventListener("change", () => {
    state.layer = Number(by("layer").value);
    changed();
  });
  by("heads").addEventListener("change", (event) => {
    state.head = Number(event.target.value);
    changed();
  });
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("select, input")) return;
    const keys = {
      ArrowLeft: () => go(state.step - 1),
      ArrowRight: () => go(state.step + 1),
      Home: () => go(0),
      End: () => go(data.steps.length - 1),
      " ": () => play(!playing),
    };
    if (!keys[event.key] || (event.key === " " && event.target.closest("button"))) return;
    event.preventDefault();
    keys[event.key]();
  });
  for (const canvas of document.querySelectorAll("canvas")) {
    canvas.addEventListener("pointermove", point);
    canvas.addEventListener("pointerdown", point);
    canvas.addEventListener("pointerleave", () => {
      by("tip").hidden = true;
    });
  }
  window.addEventListener("hashchange", () => {
    readHash();
    show();
  });
  window.addEventListener("resize", show);
  window.addEventListener(
    "scroll",
    () => {
      by("tip").hidden = true;
    },
    { passive: true },
  );
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    readPalette();
    showLegend();
    show();
  });
}

/** Says what lies under the pointer. */
function point(event) {
  const tip = by("tip"),
    x = event.offsetX,
    y = event.offsetY;
  const found = (regions.get(event.target) ?? []).find(
    (each) => x >= each.x && x < each.x + each.w && y >= each.y && y < each.y + each.h,
  );
  const text = found
    ? found.tell(
        Math.floor(((y - found.y) / found.h) * found.rows),
        Math.floor(((x - found.x) / found.w) * found.columns),
      )
    : "";
  tip.hidden = !text;
  if (!text) return;
  tip.textContent = text;
  tip.style.left = clamp(event.clientX + 14, 4, innerWidth - tip.offsetWidth - 8) + "px";
  tip.style.top =
    (event.clientY + 18 + tip.offsetHeight > innerHeight ? event.clientY - tip.offsetHeight - 10 : event.clientY + 18) +
    "px";
}

readPalette();
build();
readHash();
showLegend();
listen();
show();
