"use strict";
// The script of /debug/pools. While the page is seen it asks for figures every two seconds, and for the servers'
// sessions every six. It draws what it is told, and gives orders that were confirmed. Texts go in by textContent alone.

const FIGURES_SECONDS = 2;
const SESSIONS_SECONDS = 6;
const PATIENCE_SECONDS = 4;
const WINDOW_SECONDS = 300;
// A process that has not answered for so long is left, if another one answers at this address.
const LEAVE_SECONDS = 10;
const SERVING = ["usable", "alone"];

const $ = (id) => document.getElementById(id);
const processes = new Map(); // {now, samples, heardAt} by key.
let servers = [];
let chosen = null;
let token = null;
let silentSince = null;

// Asking.

async function ask(path, method = "GET", seconds = PATIENCE_SECONDS) {
  const headers = token === null ? {} : { Authorization: `Bearer ${token}` };
  const signal = AbortSignal.timeout(seconds * 1000);
  const answer = await fetch(new URL(path, location), { method, headers, signal, cache: "no-store" });
  const body = await answer.json().catch(() => null);
  if (answer.ok && body !== null) return body;
  throw Object.assign(new Error(body?.detail ?? "This is no answer of the service."), { status: answer.status });
}

async function askFigures() {
  const known = [...processes.values()].map(({ now, samples }) => ["known", `${now.key}.${samples.at(-1)?.[0] ?? 0}`]);
  let told;
  try {
    told = await ask(`pools/figures?${new URLSearchParams(known.slice(-20))}`);
  } catch (error) {
    refused(error);
    return;
  }
  const { now } = told;
  const before = processes.get(now.key)?.samples ?? [];
  const fresh = told.samples.filter(([number]) => number > (before.at(-1)?.[0] ?? 0));
  processes.set(now.key, { now, samples: [...before, ...fresh].slice(-WINDOW_SECONDS), heardAt: Date.now() });
  if (chosen === null || Date.now() - shown().heardAt > LEAVE_SECONDS * 1000) chosen = now.key;
  silentSince = null;
  draw();
}

async function askSessions() {
  try {
    ({ servers } = await ask("pools/sessions"));
  } catch (error) {
    // `askFigures` says it when nobody answers at all.
    servers = servers.map((one) => ({ ...one, error: `This is old: ${error.message}` }));
  }
}

async function keep(asking, seconds) {
  for (;;) {
    if (!document.hidden && $("entrance").hidden) await asking();
    await new Promise((resolve) => setTimeout(resolve, seconds * 1000));
  }
}

function refused(error) {
  if ([401, 403].includes(error.status)) {
    // A second question may have been under way with the same token.
    if (!$("entrance").hidden) return;
    say($("status"), token === null ? "The service shows its pools to operators." : error.message);
    token = null;
    $("figures").hidden = true;
    $("entrance").hidden = false;
    $("token").focus();
    return;
  }
  silentSince ??= new Date().toLocaleTimeString();
  const why = error.status ? `It answers ${error.status}: ${error.message}` : "Nothing comes back.";
  say($("status"), `The service does not answer since ${silentSince}. ${why} What is shown below is older.`);
  document.body.className = "old";
}

// Words.

function say(element, text) {
  // A live region speaks whenever it is written, so an equal text is not.
  if (element.textContent !== String(text)) element.textContent = text;
}

function duration(seconds) {
  if (seconds === null) return "an unknown time";
  if (seconds < 120) return `${seconds.toFixed(seconds < 10 ? 1 : 0)} s`;
  return seconds < 7200 ? `${Math.round(seconds / 60)} min` : `${Math.round(seconds / 3600)} h`;
}

function milliseconds(value) {
  if (value === null) return "–";
  // The histogram's first bucket ends at 1 ms: what is in it is not told apart.
  return value <= 1 ? "< 1 ms" : value < 1000 ? `${Math.round(value)} ms` : duration(value / 1000);
}

// What a pool's database does, and whether that is trouble.
function condition(pool) {
  if (pool.status === "asleep") return ["Asleep: nobody uses it, so it is not asked.", false];
  if (pool.status === "unknown") return ["Not asked yet.", false];
  if (pool.status !== "healthy") return [`Does not answer: ${pool.error}`, true];
  const answers = `Answers in ${milliseconds(pool.latency_ms)}, on timeline ${pool.timeline ?? "unknown"}.`;
  if (pool.role !== "replica") return [answers, false];
  // One that DNS has found is warmed up first, and drained when it leaves.
  if (["warming", "draining"].includes(pool.stage)) return [`${answers} It is ${pool.stage}.`, false];
  const serves = SERVING.includes(pool.state);
  return [`${answers} It is ${pool.state} and serves ${serves ? "" : "no "}reads.`, !serves];
}

function news(now, samples) {
  const found = now.paused_seconds > 0 ? ["Paused: requests wait for their connections until the pause ends."] : [];
  for (const pool of now.pools) {
    const [sentence, trouble] = condition(pool);
    if (trouble) found.push(`${pool.name}: ${sentence}`);
    if (sum(samples.slice(-3), pool, "shed")) found.push(`${pool.name} sheds requests: more come than it can serve.`);
    else if (pool.waiting) found.push(`${pool.name} is full: requests wait for a connection.`);
  }
  for (const { pools, blocked } of servers) {
    if (blocked.length) found.push(`Sessions wait for the locks of others on ${pools.join(" and ")}.`);
  }
  return found.length ? found : ["Nothing waits, nothing is shed, and every database answers."];
}

// Show a copy of a template for each item, told apart by its property `key`. A copy stays as long as its item does, and
// with it the focus in it.
function each(parent, template, key, items, update) {
  const known = new Map([...parent.children].map((child) => [child.dataset.key, child]));
  const keys = items.map((item) => String(item[key]));
  for (const [name, child] of known) if (!keys.includes(name)) child.remove();
  items.forEach((item, at) => {
    const child = known.get(keys[at]) ?? $(template).content.firstElementChild.cloneNode(true);
    child.dataset.key = keys[at];
    if (parent.children[at] !== child) parent.insertBefore(child, parent.children[at] ?? null);
    update(child, item);
  });
}

// Figures.

const shown = () => processes.get(chosen);
const field = (sample, pool, name) => sample[2][pool.name]?.[shown().now.fields.indexOf(name)] ?? null;
const sum = (samples, pool, name) => samples.reduce((total, one) => total + field(one, pool, name), 0);
const most = (samples, pool, name) => samples.reduce((top, one) => Math.max(top, field(one, pool, name)), 0);
// From 0.3 ms at the bottom to 10 s at the top.
const logarithmic = (value) => (value === null ? null : (Math.log10(Math.max(value, 0.3)) + 0.52) / 4.52);

function shape(svg, name, attributes) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  svg.append(element);
}

// Empty a chart and give the pens for it: x is the time of a sample, y goes from 0 at the bottom to 1 at the top.
function chart(svg, label, samples) {
  svg.replaceChildren();
  svg.setAttribute("aria-label", label);
  const x = (sample) => WINDOW_SECONDS - samples.at(-1)[1] + sample[1];
  const y = (share) => svg.viewBox.baseVal.height * (1 - Math.min(1, Math.max(0, share)));
  const point = (sample, share) => `${x(sample).toFixed(1)},${y(share).toFixed(1)}`;
  return {
    area(kind, to, from = () => 0) {
      const there = samples.map((one) => point(one, to(one)));
      const back = samples.map((one) => point(one, from(one))).reverse();
      shape(svg, "path", { class: kind, d: `M${there.concat(back).join("L")}Z` });
    },
    curve(kind, share) {
      // Samples without a value interrupt the curve; one that stands alone is a dash.
      const pieces = samples
        .map((one) => (share(one) === null ? " " : point(one, share(one)) + ";"))
        .join("")
        .split(/ +/);
      const paths = pieces.filter(Boolean).map((piece) => `M${piece.slice(0, -1).replaceAll(";", "L")}h1`);
      shape(svg, "path", { class: `curve ${kind}`, d: paths.join("") });
    },
    // A bar stands on the bottom; one of a negative height hangs from the top.
    bars(kind, share) {
      for (const one of samples.filter(share)) {
        const [top, height] = share(one) > 0 ? [y(share(one)), y(0) - y(share(one))] : [0, y(1 + share(one))];
        shape(svg, "rect", { class: kind(one), x: x(one) - 1, width: 2, y: top, height });
      }
    },
    rule: (kind, share) => shape(svg, "path", { class: `curve ${kind}`, d: `M0,${y(share)}H${WINDOW_SECONDS}` }),
  };
}

function drawWork(svg, pool, samples) {
  const waited = most(samples, pool, "waiting");
  const worst = most(samples, pool, "shed");
  const top = Math.max(pool.total, most(samples, pool, "total")) + waited;
  const label =
    `${pool.name}, last five minutes: at most ${most(samples, pool, "checked_out")} of ${pool.total} connections at work, ` +
    `at most ${waited} requests waiting, ${sum(samples, pool, "shed")} shed.`;
  const { area, bars, rule } = chart(svg, label, samples);
  const get = (one, ...names) => names.reduce((total, name) => total + field(one, pool, name), 0) / top;
  const full = (one) => get(one, "total");
  area("waiting", (one) => get(one, "total", "waiting"), full);
  area("idle", (one) => get(one, "checked_out", "connecting", "checked_in"));
  area("connecting", (one) => get(one, "checked_out", "connecting"));
  area("at-work", (one) => get(one, "checked_out"));
  rule("limit", pool.total / top);
  const share = (one) => (0.25 * field(one, pool, "shed")) / Math.max(worst, 1);
  bars(
    () => "shed",
    (one) => share(one) && -0.05 - share(one),
  );
  return top;
}

function drawTimes(svg, pool, samples) {
  const slowest = milliseconds(most(samples, pool, "acquire_p95"));
  const { curve, rule } = chart(svg, `${pool.name}: connections were acquired within ${slowest} (p95).`, samples);
  for (const value of [1, 10, 100, 1000]) rule("grid", logarithmic(value));
  curve("idle-hold", (one) => logarithmic(field(one, pool, "idle_p95")));
  curve("p50", (one) => logarithmic(field(one, pool, "acquire_p50")));
  curve("p95", (one) => logarithmic(field(one, pool, "acquire_p95")));
}

function drawLag(svg, pool, samples) {
  const limit = shown().now.max_lag_seconds;
  const worst = most(samples, pool, "lag_seconds");
  const height = (seconds) => (seconds === null ? null : 0.15 + (0.8 * seconds) / Math.max(limit, worst));
  const { bars, curve, rule } = chart(svg, `${pool.name}: at most ${duration(worst)} behind.`, samples);
  const serves = (one) => SERVING.includes(field(one, pool, "state"));
  bars(
    (one) => (serves(one) ? "to-replica" : "to-primary"),
    () => 0.12,
  );
  rule("grid", height(limit));
  curve("lag", (one) => height(field(one, pool, "lag_seconds")));
}

function drawPlaces(svg, pool) {
  svg.replaceChildren();
  const unit = 300 / Math.max(pool.total, pool.checked_out + pool.connecting + pool.checked_in);
  const kinds = { "at-work": pool.checked_out, connecting: pool.connecting, idle: pool.checked_in };
  const places = Object.entries(kinds).flatMap(([kind, count]) => Array(count).fill(kind));
  places.forEach((kind, at) => shape(svg, "rect", { class: kind, x: at * unit, y: 1, width: unit * 0.85, height: 12 }));
  shape(svg, "path", { class: "curve limit", d: `M${pool.pool_size * unit},0V14` });
  const open = `${pool.checked_out} at work, ${pool.connecting} connecting, ${pool.checked_in} idle`;
  svg.setAttribute("aria-label", `${open}; the size is ${pool.pool_size}, and ${pool.max_overflow} in a burst.`);
}

function drawPool(card, pool, samples) {
  const get = (selector) => card.querySelector(selector);
  const [sentence, trouble] = condition(pool);
  say(get("h3"), `${pool.name}, ${pool.server}`);
  say(get(".condition"), sentence);
  get(".condition").classList.toggle("trouble", trouble);
  const last = samples.slice(-10).findLast((one) => field(one, pool, "acquired")) ?? samples.at(-1);
  const figures = {
    Size: `${pool.pool_size} + ${pool.max_overflow}`,
    "At work": pool.checked_out,
    Connecting: pool.connecting,
    Idle: pool.checked_in,
    Waiting: pool.waiting,
    "Shed in 5 min": sum(samples, pool, "shed"),
    "Acquire p50": milliseconds(field(last, pool, "acquire_p50")),
    "Acquire p95": milliseconds(field(last, pool, "acquire_p95")),
    "Idle hold p95": milliseconds(field(last, pool, "idle_p95")),
    "Idle hold now": duration(Math.max(0, ...pool.held.map((one) => one.idle_seconds))),
  };
  if (pool.role === "replica") figures.Lag = duration(pool.lag_seconds);
  const named = Object.entries(figures).map(([name, value]) => ({ name, value }));
  each(get("dl"), "figure", "name", named, (row, { name, value }) => {
    say(row.children[0], name);
    say(row.children[1], value);
  });
  drawPlaces(get(".places"), pool);
  const top = drawWork(get(".work"), pool, samples);
  say(get(".scale"), `From five minutes ago to now. The line is at ${pool.total} connections, the top at ${top}.`);
  drawTimes(get(".times"), pool, samples);
  get(".lag-part").hidden = pool.role !== "replica";
  if (pool.role === "replica") drawLag(get(".lags"), pool, samples);
  get("h4").hidden = !pool.held.length;
  const server = servers.find((one) => one.pools.includes(pool.name));
  const held = pool.held.map((one, at) => ({ ...one, key: one.pid ?? `${one.holder} ${at}` }));
  each(get(".held"), "session", "key", held, (item, one) => {
    const idle = `${duration(one.idle_seconds)} of it without a query`;
    const more = [one.pid && `session ${one.pid}`, one.taken_in && `taken in ${one.taken_in}`].filter(Boolean);
    drawSession(item, [`${one.holder} for ${duration(one.held_seconds)}`, idle, ...more].join(", "), one.pid, server);
  });
  const drain = get(".buttons button");
  drain.hidden = !shown().now.acts;
  drain.setAttribute("aria-label", `Drain ${pool.name} …`);
  drain.onclick = () => confirmDrain(pool.name);
}

// Sessions of the servers.

function drawSession(item, words, pid, server) {
  const session = server?.sessions.find((one) => one.pid === pid);
  const [text, code, button] = item.children;
  say(text, words);
  const statement = `${session?.state === "active" ? "" : "Last: "}${session?.statement || "not shown to this role"}`;
  say(code, session ? statement : "");
  button.hidden = !session || !shown().now.acts;
  button.setAttribute("aria-label", `End session ${pid} …`);
  button.onclick = () => confirmEnd(server.pools[0], session);
}

function drawBlocked(parent, { blocked, ...server }) {
  const blockers = [...new Set(blocked.map((pair) => pair.blocker_pid))];
  const roots = blockers.filter((pid) => !blocked.some((pair) => pair.pid === pid));
  // Without a root they wait for each other, and the server is about to end one.
  const trees = (roots.length ? roots : blockers).map((pid) => {
    const behind = new Set([pid]);
    for (const one of behind) for (const pair of blocked) if (pair.blocker_pid === one) behind.add(pair.pid);
    const pairs = blocked.filter((pair) => behind.has(pair.blocker_pid));
    return { ...pairs.find((pair) => pair.blocker_pid === pid), count: behind.size - 1, pairs };
  });
  each(parent, "session", "blocker_pid", trees, (item, root) => {
    const who = `${root.blocker_role} ${root.blocker_application}, ${root.blocker_state}`;
    const since = `in a transaction for ${duration(root.blocker_transaction_seconds)}`;
    const many = root.count === 1 ? "1 session" : `${root.count} sessions`;
    drawSession(item, `${root.blocker_pid} (${who}, ${since}) blocks ${many}:`, root.blocker_pid, server);
    const pairs = root.pairs.map((pair) => ({ ...pair, key: `${pair.pid} ${pair.blocker_pid}` }));
    each(item.lastElementChild, "session", "key", pairs, (line, pair) => {
      const waits = `has waited ${duration(pair.waited_seconds)} for ${pair.lock}, held by ${pair.blocker_pid}`;
      drawSession(line, `${pair.pid} (${pair.role} ${pair.application}) ${waits}`, pair.pid, server);
    });
  });
}

// Those of more than a second; those that block or wait are in the section before.
function longTransactions({ sessions, blocked }) {
  const involved = blocked.flatMap((pair) => [pair.pid, pair.blocker_pid]);
  return sessions.filter((one) => one.transaction_seconds >= 1 && !involved.includes(one.pid));
}

function drawTransactions(parent, server) {
  each(parent, "session", "pid", longTransactions(server), (item, one) => {
    const waits = one.waits_for === null ? "" : `, waits for ${one.waits_for}`;
    const since = `in a transaction for ${duration(one.transaction_seconds)}${waits}`;
    drawSession(item, `${one.pid} (${one.role} ${one.application}), ${one.state}, ${since}`, one.pid, server);
  });
}

// Show the servers of which there is something to say; `select` lists what.
function drawServers(parent, select, drawInto, nothing) {
  const told = servers.filter((server) => server.error !== null || select(server).length);
  const keyed = told.map((server) => ({ ...server, key: server.pools.join(" and ") }));
  each(parent, "server", "key", keyed, (place, server) => {
    const [title, trouble, sessions] = place.children;
    say(title, `${server.key}, ${server.server}`);
    say(trouble, server.error ?? "");
    drawInto(sessions, server);
  });
  say(parent.nextElementSibling, keyed.length ? "" : nothing);
}

// Reads and budget.

function drawReads(samples) {
  const reads = (one, wanted) => one[3].reduce((total, [to, , count]) => total + (wanted(to) ? count : 0), 0);
  const top = Math.max(1, ...samples.map((one) => reads(one, () => true)));
  const totals = {};
  for (const [to, why, count] of samples.flatMap((one) => one[3])) {
    const key = `${to} ${why}`;
    totals[key] = { key, to, why, count: (totals[key]?.count ?? 0) + count };
  }
  const rows = Object.values(totals).sort((one, other) => other.count - one.count);
  const label = rows.map((row) => `${row.count} to ${row.to}`).join(", ") || "none";
  const { area } = chart($("reads"), `Reads of the last five minutes: ${label}.`, samples);
  area("to-primary", (one) => reads(one, () => true) / top);
  area("to-replica", (one) => reads(one, (to) => to !== "primary") / top);
  each($("reasons"), "reason", "key", rows, (line, row) => {
    [row.to, row.why.replaceAll("_", " "), row.count].forEach((text, at) => say(line.children[at], text));
  });
}

function drawShare(place, share) {
  const [title, sentence, svg, arithmetic] = place.children;
  const unit = 300 / Math.max(share.granted, share.wanted, 1);
  const grants = share.granted === null ? "nobody says how many it grants" : `the server grants ${share.granted}`;
  const tooMany = share.granted !== null && share.wanted > share.granted;
  say(title, share.server);
  say(
    sentence,
    `${share.open} are open here now. This instance may open ${share.per_instance}, all instances ${share.wanted}, and ` +
      `${grants}.${tooMany ? " That is too little." : ""}`,
  );
  sentence.classList.toggle("trouble", tooMany);
  say(arithmetic, share.arithmetic);
  svg.replaceChildren();
  svg.setAttribute("aria-label", sentence.textContent);
  const counts = { wanted: share.wanted, idle: share.per_instance, "at-work": share.open };
  for (const [kind, count] of Object.entries(counts)) {
    shape(svg, "rect", { class: kind, width: count * unit, height: 14 });
  }
  if (share.granted !== null) shape(svg, "path", { class: "curve limit", d: `M${share.granted * unit},0V14` });
}

// All of it.

const nameOf = ({ pid, host, workers }) => `${pid} on ${host}${workers > 1 ? `, one of ${workers} workers` : ""}`;

function draw() {
  const { now, samples } = shown();
  $("figures").hidden = false;
  document.body.className = "";
  say($("status"), now.paused_seconds > 0 ? "Live, and paused." : "Live.");
  const sentences = news(now, samples).map((text) => ({ text }));
  each($("news"), "line", "text", sentences, (line, { text }) => say(line, text));
  $("orders").hidden = !now.acts;
  $("no-orders").hidden = now.acts;
  each($("pools"), "pool", "name", now.pools, (card, pool) => drawPool(card, pool, samples));
  drawServers($("blocked"), (server) => server.blocked, drawBlocked, "Nobody blocks anybody.");
  drawServers($("transactions"), longTransactions, drawTransactions, "There is none.");
  drawReads(samples);
  each($("budget"), "share", "server", now.budget, drawShare);
  $("choice").hidden = processes.size < 2;
  const answering = [...processes.values()].map((one) => one.now);
  each($("processes"), "choosable", "key", answering, (option, one) => {
    option.value = one.key;
    say(option, nameOf(one));
  });
  $("processes").value = chosen;
}

function tick() {
  if (chosen === null) return;
  const { now, heardAt } = shown();
  const pause = now.paused_seconds > 0 ? ` The pause ends in ${duration(now.paused_seconds)}.` : "";
  say($("age"), `Process ${nameOf(now)}. Its figures are ${Math.round((Date.now() - heardAt) / 1000)} s old.${pause}`);
}

// Orders: a button asks, and the answer to the question gives the order.

function question(title, text, verb, give, asksSeconds = false) {
  const hosts = new Set([...processes.values()].map(({ now }) => now.host));
  const several = ` ${hosts.size} instances answer at this address, and nobody chooses which one gets the order.`;
  say($("question-title"), title);
  say($("question-text"), hosts.size > 1 ? text + several : text);
  say($("yes"), verb);
  $("question-seconds").hidden = !asksSeconds;
  $("yes").onclick = () => {
    $("question").close();
    say($("outcome"), "The order is given …");
    give().then(
      (words) => say($("outcome"), words),
      (error) => say($("outcome"), `Not done: ${error.message}`),
    );
  };
  $("question").showModal();
}

async function order(path, done) {
  const told = await ask(path, "POST", 20);
  const pending = Object.entries(told.pending).filter(([, count]) => count > 0);
  const still = pending.map(([pool, count]) => ` ${count} of ${pool} are still at work.`).join("");
  return `${done} by ${told.obeyed} of ${told.workers} workers.${still} ${told.failures.join(" ")}`;
}

function confirmDrain(pool = null) {
  const which = pool === null ? "all pools" : pool;
  const text = "Idle connections are closed now, and those at work at their release. No request fails for it.";
  const query = pool === null ? "" : `?${new URLSearchParams({ pool })}`;
  question(`Drain ${which}?`, text, `Yes, drain ${which}`, () => order(`drain${query}`, `Drained (${which})`));
}

function confirmEnd(pool, { pid, started, role, application }) {
  const text = `It is of ${role} ${application}. Its transaction is rolled back, and its client gets an error.`;
  const query = new URLSearchParams({ pool, pid, ...(started === null ? {} : { started }) });
  question(`End session ${pid}?`, text, `Yes, end ${pid}`, async () => {
    await ask(`end?${query}`, "POST");
    askSessions();
    return `Session ${pid} was told to end.`;
  });
}

$("pause").onclick = () => {
  const text = "Requests wait for their connections until somebody resumes, or for these seconds. Those at work go on.";
  question(
    "Pause this instance?",
    text,
    "Yes, pause",
    () => order(`pause?seconds=${$("seconds").value}`, "Paused"),
    true,
  );
};
$("resume").onclick = () => {
  const text = "The pools connect anew, and those who have waited are served.";
  question("Resume this instance?", text, "Yes, resume", () => order("resume", "Resumed"));
};
$("drain").onclick = () => confirmDrain();
$("no").onclick = () => $("question").close();
$("processes").onchange = (event) => {
  chosen = event.target.value;
  draw();
};
$("entrance").onsubmit = (event) => {
  event.preventDefault();
  token = $("token").value.trim();
  $("token").value = "";
  $("entrance").hidden = true;
  say($("status"), "Asking the service …");
  askFigures().then(askSessions);
};
setInterval(tick, 1000);
keep(askFigures, FIGURES_SECONDS);
keep(askSessions, SESSIONS_SECONDS);
