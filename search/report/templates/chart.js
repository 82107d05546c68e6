// A frontier as SVG: every point at its cost and top-1, and the line through those that no other beats in both.
const Chart = (() => {
  const known = Object.fromEntries(JSON.parse(document.getElementById("methods").textContent)); // in the report's order
  const symbols = [...document.querySelectorAll("symbol")].map((one) => one.id.replace("mark-", ""));
  const own = Object.keys(known).length;
  const spare = symbols.length - 1 - own; // the last is the teacher's
  const height = 320;
  const edge = { left: 54, right: 16, top: 14, bottom: 44 };

  const label = (method) => method.split("+").map((part) => known[part] ?? part).join(" + ");

  // As in the report: the methods keep their places, chains and others share the rest in order of name.
  const marks = (methods) => {
    const others = [...new Set(methods)].filter((name) => !(name in known)).sort();
    const place = (name) => (name in known ? Object.keys(known).indexOf(name) : own + (others.indexOf(name) % spare));
    return Object.fromEntries([...new Set(methods)].map((name) => [name, { place: place(name), symbol: symbols[place(name)] }]));
  };

  const made = (kind, attributes = {}, text = "") => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", kind);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.textContent = text;
    return element;
  };

  const frontier = (points) => {
    let best = -Infinity;
    const order = [...points].sort((one, other) => one.cost - other.cost || other.top1 - one.top1);
    return order.filter((point) => point.top1 > best && ((best = point.top1), true));
  };

  const ticks = (low, high) => {
    const rough = (high - low) / 5;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].find((factor) => factor * power >= rough) * power;
    const first = Math.ceil(low / step - 1e-9);
    return Array.from({ length: Math.floor(high / step + 1e-9) - first + 1 }, (_, index) => (first + index) * step);
  };

  const percent = (share, digits = 0) => `${(100 * share).toFixed(digits)} %`;

  // A search knows shares alone: `metric` tells the values of its own that the shares 0 and 1 stand for.
  const scale = ({ worst, best }) => {
    const isShare = worst === 0 && best === 1;
    return {
      share: (value) => (value - worst) / (best - worst),
      value: (share) => worst + share * (best - worst),
      shown: (value, digits = 1) => (isShare ? percent(value, digits) : String(Number(value.toPrecision(4)))),
    };
  };

  const shown = (metric, share) => scale(metric).shown(scale(metric).value(share));

  const symbolOf = (mark, size, x, y) =>
    made("use", { href: `#mark-${mark.symbol}`, class: `mark-${mark.place}`, x: x - size / 2, y: y - size / 2, width: size, height: size });

  const draw = (place, { metric, teacher, points }, axis) => {
    const { share, value, shown } = scale(metric);
    const width = Math.max(280, place.clientWidth);
    const placed = points.filter((one) => axis in one.costs).map((one) => ({ ...one, cost: one.costs[axis] }));
    const all = [...placed, { cost: 1, top1: teacher, isTeacher: true }];
    const lowest = Math.min(...all.map((one) => one.top1));
    const highest = Math.max(...all.map((one) => one.top1));
    const room = Math.max(0.01, 0.08 * (highest - lowest));
    const [low, high] = [Math.max(0, lowest - room), Math.min(1.005, highest + room)];
    const far = 1.04 * Math.max(...all.map((one) => one.cost));
    const x = (cost) => edge.left + (cost / far) * (width - edge.left - edge.right);
    const y = (top1) => height - edge.bottom - ((top1 - low) / (high - low)) * (height - edge.top - edge.bottom);
    const svg = made("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `Validation ${metric.name} over ${axis}` });
    const ends = [low, Math.min(1, high)].map(value).sort((one, other) => one - other);
    for (const tick of ticks(...ends)) {
      const top1 = share(tick);
      svg.append(made("line", { class: "grid", x1: edge.left, x2: width - edge.right, y1: y(top1), y2: y(top1) }));
      svg.append(made("text", { x: edge.left - 8, y: y(top1) + 4, "text-anchor": "end" }, shown(tick, high - low < 0.05 ? 1 : 0)));
    }
    for (const cost of ticks(0, far)) {
      svg.append(made("text", { x: x(cost), y: height - edge.bottom + 20, "text-anchor": "middle" }, percent(cost)));
    }
    svg.append(made("text", { x: width - edge.right, y: height - 6, "text-anchor": "end" }, "of the teacher's"));
    const line = frontier(all);
    const steps = line.map((one, index) => `${index ? `H${x(one.cost)}` : `M${x(one.cost)} ${y(one.top1)}`}V${y(one.top1)}`);
    svg.append(made("path", { class: "step", d: `${steps.join("")}H${x(far)}` }));
    const looks = marks(points.map((one) => one.method));
    for (const one of placed) {
      const mark = symbolOf(looks[one.method], line.includes(one) ? 15 : 11, x(one.cost), y(one.top1));
      mark.classList.add("point");
      mark.classList.toggle("weak", !line.includes(one));
      const title = `${one.budget} ${one.trial}: ${label(one.method)}, ${shown(value(one.top1))} at ${percent(one.cost, 1)}`;
      mark.append(made("title", {}, title));
      svg.append(mark);
    }
    svg.append(symbolOf({ symbol: "star", place: "teacher" }, 16, x(1), y(teacher)));
    place.replaceChildren(svg);
  };

  const legend = (place, points) => {
    const looks = marks(points.map((one) => one.method));
    const entries = Object.entries(looks).sort(([, one], [, other]) => one.place - other.place);
    place.replaceChildren(
      ...[...entries, ["Teacher", { symbol: "star", place: "teacher" }]].map(([method, mark]) => {
        const entry = document.createElement("span");
        entry.className = "method";
        const svg = made("svg", { class: "symbol", viewBox: "0 0 16 16", "aria-hidden": "true" });
        svg.append(symbolOf(mark, 16, 8, 8));
        entry.append(svg, label(method));
        return entry;
      }),
    );
  };

  return { draw, legend, label, percent, shown };
})();
