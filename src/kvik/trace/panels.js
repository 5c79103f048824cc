// The panels: each is filled from the chosen step, layer and head. Text from the trace is set as text only.

function showText(at) {
  const step = data.steps[state.step],
    chips = by("chips"),
    guess = step.guesses[0];
  chips.replaceChildren(
    ...data.tokens.map((token, place) => {
      const kind = place >= step.end ? "later" : place >= step.start ? "new" : at.state(place);
      const chip = make("button", kind === "seen" ? "" : kind);
      chip.append(make("i", "", place), token);
      chip.type = "button";
      chip.tabIndex = -1; // the slider serves the keyboard
      chip.title = `token ${place}` + (kind === "hidden" || kind === "gone" ? `, ${kind}` : "");
      chip.addEventListener("click", () => go(data.steps.findIndex((each) => place < each.end)));
      return chip;
    }),
  );
  if (step.next === null) chips.append(make("span", "guess", guess[0] + " ?"));
  const current = chips.children[step.end - 1];
  chips.scrollTop = clamp(
    chips.scrollTop,
    current.offsetTop - chips.offsetTop - chips.clientHeight + 40,
    current.offsetTop - chips.offsetTop - 8,
  );
  const added = step.end - step.start,
    names = added === 1 ? `“${data.tokens[step.start]}”` : `tokens ${step.start} to ${step.end - 1}`;
  by("said").textContent = state.step
    ? `Decode: one new token, ${names}. Its query meets the keys of ${plural(seenNow(at), "row")}, of which only its own is new.`
    : added === 1
      ? `Prefill: the first token goes in, ${names}. There is nothing to look back at yet.`
      : `Prefill: ${names} go in as one chunk. All their rows are computed here, with a cache or without.`;
  by("guesses").replaceChildren(
    ...step.guesses.map(([token, share, id]) => {
      const item = make("li", id === step.next ? "came" : "");
      if (id === step.next) item.title = "this is how the text goes on";
      item.append(make("span", "token", token), " ", make("span", "share", percent(share)));
      return item;
    }),
  );
}

/** How many rows the step's last query sees. */
const seenNow = (at) => tally(at.to, (row) => at.sees(at.to - 1, row));

function showFigures(at) {
  const added = at.to - at.from,
    back = at.to - added;
  by("with-sum").textContent =
    `${plural(added, "row")} of k and v computed` + (back ? `, ${whole(seenNow(at) - added)} reused` : "");
  by("without-sum").textContent =
    `${plural(at.to, "row")} of k and v computed` + (back ? `, ${whole(back)} of them again` : "");
  drawStep(by("with"), { ...at, cached: true });
  drawStep(by("without"), { ...at, cached: false, held: at.to, everyPair: data.hides });
  const own = `Layer ${state.layer}, head ${state.head}, step ${state.step + 1}: `;
  by("with").setAttribute(
    "aria-label",
    `${own}one matrix K transposed and one matrix V of ${at.held} kept rows, ${added} of them new; one query a new token.`,
  );
  by("without").setAttribute("aria-label", `${own}all ${at.to} rows of k and v, queries and outputs computed again.`);
}

function showBars(at) {
  const query = at.to - 1,
    seen = [];
  for (let row = 0; row <= query; row++) if (at.sees(query, row)) seen.push(row);
  const most = 14,
    strongest = new Set([...seen].sort((a, b) => at.weight(query, b) - at.weight(query, a)).slice(0, most));
  const items = seen
    .filter((row) => strongest.has(row))
    .map((row) => {
      const item = make("li", row >= at.from ? "new" : ""),
        track = make("div", "track"),
        fillBar = make("div", "fill");
      fillBar.style.width = 100 * at.weight(query, row) + "%";
      track.append(fillBar);
      item.append(
        make("i", "", row),
        make("span", "token", at.token(row)),
        track,
        make("span", "share", percent(at.weight(query, row))),
      );
      return item;
    });
  if (seen.length > most) {
    const rest = seen.reduce((sum, row) => sum + (strongest.has(row) ? 0 : at.weight(query, row)), 0);
    items.push(make("li", "rest", `${seen.length - most} more rows share ${percent(rest)}`));
  }
  by("bars").replaceChildren(...items);
  const sums = [];
  for (let q = 2; q < count; q++) sums.push(at.sees(q, 0) ? at.weight(q, 0) : 0);
  const sink = sums.length && sums.reduce((a, b) => a + b, 0) / sums.length > 0.5;
  const unseen = at.to - seen.length;
  by("bars-note").textContent =
    `“${at.token(query)}” asks, and its weights over the rows it sees add up to 100 %.` +
    (unseen ? ` ${plural(unseen, "row")} ${lets ? "let go" : "behind the window"} ${unseen === 1 ? "gets" : "get"} none.` : "") +
    (sink
      ? " This head gives most of its weight to the first token, as many do: an attention sink, where weight goes that is not needed elsewhere."
      : "");
}

function versus(id, pairs) {
  by(id).replaceChildren(
    ...pairs.map(([kind, value, text]) => {
      const item = make("span", kind);
      item.append(make("strong", "", value), text);
      return item;
    }),
  );
}

function showCounts(at) {
  for (const [id, unit, [mine, theirs]] of [
    ["rows", "rows", at.rows],
    ["pairs", "pairs", at.pairs],
  ]) {
    versus(id + "-now", [
      ["with", whole(mine[state.step]), "with the cache"],
      ["without", whole(theirs[state.step]), "without"],
    ]);
    drawCurves(
      by(id),
      [
        { name: "without", colour: palette.again, values: theirs },
        { name: "with", colour: palette.new, values: mine },
      ],
      ends,
      state.step,
    );
    by(id).setAttribute(
      "aria-label",
      `${unit} so far: ${mine[state.step]} with the cache, ${theirs[state.step]} without; at the end ${mine[mine.length - 1]} and ${theirs[theirs.length - 1]}.`,
    );
  }
  const n = count,
    law = (pairs, mine, theirs, texts) =>
      pairs[0][n - 1] === mine && pairs[1][n - 1] === theirs ? ` For n tokens: ${texts}.` : "";
  by("rows-note").textContent =
    "With the cache a row is computed once. Without it each step computes the rows of the whole text so far." +
    law(at.rows, n, (n * (n + 1)) / 2, "n against n(n+1)/2");
  by("pairs-note").textContent =
    (data.hides
      ? lets
        ? "A query sees the rows that the policy has left. Without a cache there is every row."
        : "Behind a window a query sees no more rows than the window has. Without a cache there is no window."
      : "With the cache only the new query is asked. It still has to look at every row that is kept: that work a cache does not save.") +
    law(at.pairs, (n * (n + 1)) / 2, (n * (n + 1) * (n + 2)) / 6, "n(n+1)/2 against n(n+1)(n+2)/6");
}

function showBytes() {
  const [payload, overhead] = data.steps[state.step].bytes,
    sums = data.steps.map((step) => step.bytes[0] + step.bytes[1]);
  versus("bytes-now", [
    ["", whole(payload + overhead), "allocated"],
    ["", whole(payload), "payload"],
    ["", whole(overhead), "overhead"],
  ]);
  drawCurves(
    by("bytes"),
    [
      { name: "allocated", colour: palette.kept, values: sums, pale: true },
      { name: "payload", colour: palette.kept, values: data.steps.map((step) => step.bytes[0]) },
    ],
    ends,
    state.step,
    true,
  );
  by("bytes").setAttribute("aria-label", `${payload} bytes of payload and ${overhead} of overhead are held.`);
  by("bytes-note").textContent =
    `All ${plural(data.layers * data.lanes, "lane")} of ${plural(data.layers, "layer")}, cache ${data.spec}. Payload (dark) is the rows that are seen; overhead is scales, page tables and what is empty or hidden in pages of ${data.page_rows} rows, which are held whole.`;
}

function showSame() {
  const step = data.steps[state.step],
    same = Math.max(...step.same),
    items = [];
  const exact = `with f32 rows${data.hides ? " and " + data.hides : ""} (logits; attention outputs ${number(step.plain[1])})`;
  for (const [value, text] of [
    [same, `from computing the whole text again under ${data.spec}`],
    [step.plain[0], `from computing it again ${exact}`],
  ]) {
    items.push(make("dt", value === 0 ? "zero" : "", number(value)), make("dd", "", text));
  }
  by("same").replaceChildren(...items);
  by("same-note").textContent =
    (same === 0 ? "Bit for bit the same: " : "NOT the same: ") +
    "at this step the whole text was really run again from nothing, and its last logits and attention outputs compared. The second number is what this cache's precision" +
    (data.hides ? ` and its ${lets ? "policy" : "window"} cost.` : " costs.");
}

function showPlace() {
  const step = data.steps[state.step],
    phase = step.start < data.prompt ? "prefill" : "decode";
  by("where").textContent = `step ${state.step + 1} of ${data.steps.length}`;
  by("phase").textContent = phase;
  by("phase").className = "pill " + phase;
  by("slider").value = state.step + 1;
  by("slider").setAttribute(
    "aria-valuetext",
    `step ${state.step + 1} of ${data.steps.length}, ${phase}, token ${data.tokens[step.end - 1]}`,
  );
  const first = state.step === 0,
    end = state.step === data.steps.length - 1;
  for (const id of ["first", "back"]) by(id).disabled = first;
  for (const id of ["last", "forward"]) by(id).disabled = end;
  by("play").disabled = data.steps.length === 1;
  by("play").textContent = playing ? "❚❚" : "▶";
  by("play").setAttribute("aria-label", playing ? "Pause" : "Play");
  by("layer").value = state.layer;
  for (const input of by("heads").querySelectorAll("input")) input.checked = Number(input.value) === state.head;
  const lane = laneOf(state.head),
    shared = data.heads / data.lanes,
    heads = Array.from({ length: shared }, (_, i) => lane * shared + i);
  for (const group of by("heads").querySelectorAll(".lane"))
    group.classList.toggle("mine", Number(group.dataset.lane) === lane);
  by("sharing").textContent =
    shared === 1
      ? `Every query head has a lane (a KV head) of its own: ${plural(data.lanes, "row")} of k and v a token and layer.`
      : `Heads ${heads.slice(0, -1).join(", ")} and ${heads[shared - 1]} share lane ${lane}, a KV head (grouped-query attention): ${data.heads} heads ask, but only ${plural(data.lanes, "row")} of k and v ${data.lanes === 1 ? "is" : "are"} kept a token and layer.`;
}

function show() {
  const at = look();
  showPlace();
  showText(at);
  showFigures(at);
  showBars(at);
  drawTriangle(by("triangle"), at);
  by("triangle").setAttribute("aria-label", `Attention weights of the first ${at.to} tokens over each other.`);
  showCounts(at);
  showBytes();
  showSame();
}

function showLegend() {
  const items = [
    ["kept", "kept from an earlier step"],
    ["new", "new in this step"],
    ["again", "computed again"],
  ].map(([kind, text]) => {
    const item = make("li"),
      swatch = make("i");
    swatch.style.background = gradient(palette.ramp[kind]);
    item.append(swatch, text);
    return item;
  });
  if (data.hides) {
    for (const [kind, text] of lets
      ? [["hatch", "let go by the policy"]]
      : [
          ["pale", "hidden by the window, but still in a page"],
          ["hatch", "gone with its page"],
        ]) {
      const item = make("li"),
        swatch = make("i", kind);
      if (kind === "pale") swatch.style.background = gradient(palette.ramp.kept);
      item.append(swatch, text);
      items.push(item);
    }
  }
  items.push(make("li", "", "Dark is negative, light positive. Empty frames: steps to come, or asked and forgotten."));
  by("legend").replaceChildren(...items);
}
