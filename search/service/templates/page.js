// The page over the service: it keeps nothing but the token, for this tab, and sends it as a header only.
(() => {
  const at = (id) => document.getElementById(id);
  const refreshMs = 5000;
  let token = sessionStorage.getItem("token");
  let watched = null; // the chosen search: its id, what was heard of it, and how to hang up

  const show = (element, isShown) => (element.hidden = !isShown);

  const tell = (element, text) => {
    element.textContent = text;
    show(element, Boolean(text));
  };

  const call = async (path, options = {}) => {
    const headers = { ...options.headers, ...(token && { Authorization: `Bearer ${token}` }) };
    const answer = await fetch(path, { ...options, headers });
    if (answer.status === 401) show(at("door"), true);
    if (!answer.ok) throw new Error((await answer.json().catch(() => ({}))).error ?? `the service answered ${answer.status}`);
    return answer;
  };

  const row = (...cells) => {
    const made = document.createElement("tr");
    made.append(
      ...cells.map((cell, index) => {
        const place = document.createElement(index ? "td" : "th");
        place.className = cell?.number === undefined ? "" : "number";
        place.append(cell?.number ?? cell ?? "—");
        return place;
      }),
    );
    return made;
  };

  const number = (text) => ({ number: text ?? "—" });
  const percent = (share, digits = 1) => (share === null || share === undefined ? "—" : Chart.percent(share, digits));

  const score = (metric, share) => (share === null || share === undefined ? "—" : Chart.shown(metric, share));

  const duration = (seconds) => {
    if (seconds < 60) return `${seconds.toFixed(0)} s`;
    return seconds < 3600 ? `${(seconds / 60).toFixed(1)} min` : `${(seconds / 3600).toFixed(1)} h`;
  };

  const isOver = ({ phase }) => ["done", "failed", "stopped"].includes(phase);

  const list = async () => {
    try {
      const { searches } = await (await call("searches")).json();
      tell(at("trouble"), "");
      show(at("none"), !searches.length);
      at("searches").replaceChildren(
        ...searches.map((one) => {
          const link = document.createElement("a");
          link.href = `#${one.id}`;
          link.textContent = one.name;
          const until = one.ended ?? (isOver(one) ? null : Date.now() / 1000); // of a killed one nobody wrote the end
          const took = one.started && until && duration(until - one.started);
          const began = one.started && new Date(1000 * one.started).toLocaleString();
          const made = row(link, one.id, one.phase, number(began), number(took));
          made.classList.toggle("chosen", one.id === watched?.id);
          return made;
        }),
      );
    } catch (error) {
      tell(at("trouble"), error.message);
    }
  };

  // EventSource cannot send a header, so the stream is read by hand.
  const listen = async (path, signal, heard) => {
    const reader = (await call(path, { signal })).body.pipeThrough(new TextDecoderStream()).getReader();
    for (let text = ""; ; ) {
      const { done, value } = await reader.read();
      if (done) return;
      const parts = (text + value).split("\n\n");
      text = parts.pop();
      for (const part of parts) {
        const [, kind, data] = part.match(/^event: (\w+)\ndata: (.*)$/) ?? [];
        if (kind) heard(kind, JSON.parse(data));
      }
    }
  };

  const watch = async (id) => {
    watched?.line.abort();
    const mine = { id, line: new AbortController(), found: null, hasEnded: false };
    watched = mine;
    show(at("search"), false);
    show(at("winners"), false);
    at("chart").replaceChildren();
    at("legend").replaceChildren();
    list();
    while (watched === mine && !mine.hasEnded) {
      mine.found = null; // a new stream begins with every point
      try {
        await listen(`searches/${encodeURIComponent(id)}/events`, mine.line.signal, (kind, value) => heard(mine, kind, value));
      } catch (error) {
        if (watched === mine) tell(at("trouble"), error.message);
      }
      if (!mine.hasEnded) await new Promise((go) => setTimeout(go, refreshMs));
    }
  };

  const heard = (mine, kind, value) => {
    if (watched !== mine) return;
    tell(at("trouble"), kind === "trouble" ? value.error : "");
    if (kind === "progress") showProgress(value);
    if (kind === "points") {
      mine.found = { ...value, points: [...(mine.found?.points ?? []), ...value.points] };
      showPoints(mine.found);
    }
    if (kind === "end") {
      mine.hasEnded = true;
      list();
      showWinners(mine);
    }
  };

  const showProgress = (view) => {
    show(at("search"), true);
    at("name").textContent = view.name;
    at("phase").textContent = view.phase;
    at("phase").className = `pill ${view.phase}`;
    at("message").textContent = view.message;
    at("trials").textContent = view.expected ? `${view.trials} of ${view.expected}` : view.trials;
    at("stopped").textContent = view.stopped;
    at("spent").textContent = duration(view.wall_s);
    at("report").href = `searches/${encodeURIComponent(view.id)}/report`;
    show(at("report"), view.trials > 0);
    show(at("stop"), !isOver(view));
    at("stop").disabled = false;
    at("best").replaceChildren(...Object.entries(view.best).map(([budget, best]) => tile(view.metric, budget, best)));
    for (const place of document.querySelectorAll(".metric")) place.textContent = view.metric.name;
  };

  const tile = (metric, budget, best) => {
    const made = document.createElement("article");
    const [title, big, note] = ["h2", "p", "p"].map((kind) => document.createElement(kind));
    title.textContent = budget;
    big.className = best ? "big" : "big none";
    big.textContent = best ? score(metric, best.top1_validation) : "No model yet";
    note.className = "note";
    note.textContent = best ? `validation ${metric.name}, by ${Chart.label(best.method)}` : "within its limits";
    made.append(title, big, note);
    return made;
  };

  const axisName = (axis) => {
    const device = axis.match(/^latency_ms\/(.*)$/)?.[1];
    return device ? `latency on ${device}` : { macs: "MACs", params: "params" }[axis];
  };

  const showPoints = (found) => {
    const select = at("axis");
    const chosen = found.axes.includes(select.value) ? select.value : found.axes[0];
    select.replaceChildren(...found.axes.map((axis) => new Option(axisName(axis), axis, false, axis === chosen)));
    at("count").textContent = `${found.points.length} models measured`;
    Chart.draw(at("chart"), found, chosen);
    Chart.legend(at("legend"), found.points);
  };

  const redraw = () => watched?.found && showPoints(watched.found);

  const showWinners = async (mine) => {
    const answer = await call(`searches/${encodeURIComponent(mine.id)}/frontier`).catch(() => null);
    if (!answer || watched !== mine) return;
    const { teacher, budgets, metric = { name: "top-1", worst: 0, best: 1 } } = await answer.json();
    at("won").replaceChildren(
      ...budgets.map(({ name, winner }) =>
        winner
          ? row(name, Chart.label(winner.method), number(score(metric, winner.top1_validation)),
              number(score(metric, winner.top1_test)), number(percent(winner.macs / teacher.macs)),
              number(percent(winner.params / teacher.params)))
          : row(name, "no model fits", number(), number(), number(), number()),
      ),
    );
    const uris = budgets.filter(({ winner }) => winner?.model_uri);
    const lines = uris.map(({ name, winner }) => `model = mlflow.pytorch.load_model(${JSON.stringify(winner.model_uri)})  # ${name}`);
    tell(at("snippet"), lines.length ? ["import mlflow", "", ...lines].join("\n") : "");
    show(at("winners"), true);
  };

  at("door").addEventListener("submit", (event) => {
    event.preventDefault();
    token = at("token").value.trim();
    sessionStorage.setItem("token", token);
    at("token").value = "";
    show(at("door"), false);
    list();
    choose();
  });

  at("new").addEventListener("submit", async (event) => {
    event.preventDefault();
    at("submit").disabled = true;
    tell(at("mistakes"), "");
    try {
      const headers = { "Content-Type": "application/yaml" };
      const { id } = await (await call("searches", { method: "POST", headers, body: at("spec").value })).json();
      if (location.hash.slice(1) === id) watch(id); // a cluster that was restarted counts from 1 again
      else location.hash = id;
    } catch (error) {
      tell(at("mistakes"), error.message);
    }
    at("submit").disabled = false;
  });

  at("stop").addEventListener("click", async () => {
    at("stop").disabled = true;
    try {
      await call(`searches/${encodeURIComponent(watched.id)}`, { method: "DELETE" });
    } catch (error) {
      tell(at("trouble"), error.message);
      at("stop").disabled = false;
    }
    list();
  });

  // A link sends no token, so with one the report is fetched and kept as a file.
  at("report").addEventListener("click", async (event) => {
    if (!token) return;
    event.preventDefault();
    try {
      const link = document.createElement("a");
      link.href = URL.createObjectURL(await (await call(at("report").getAttribute("href"))).blob());
      link.download = `${watched.id}.html`;
      link.click();
      URL.revokeObjectURL(link.href);
    } catch (error) {
      tell(at("trouble"), error.message);
    }
  });

  const choose = () => {
    const id = decodeURIComponent(location.hash.slice(1));
    if (id && (id !== watched?.id || !watched.found)) watch(id);
  };

  at("axis").addEventListener("change", redraw);
  addEventListener("resize", redraw);
  addEventListener("hashchange", choose);
  setInterval(() => document.hidden || list(), refreshMs);
  list();
  choose();
})();
