'use strict';
// Draws the trajectories of a page. Texts of a model become text nodes, never HTML.

const PER_PAGE = 24, TEXT = 20000, LINES = 400;
const UNSEEN = /[\p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Zl}\p{Zp}]/gu;
const byId = (id) => document.getElementById(id);
const state = {rows: [], shown: [], page: 0, at: -1, wanted: new Set(), known: new Map()};
const data = new Map();     // name -> what was loaded
const waiting = new Map();  // name -> [resolve, reject] of who asked for it
let start, entryNames, images;

// ---------------------------------------------------------------- data

window.mm = (name, value) => {  // files of data call it
  waiting.get(name)?.[0](value);
  waiting.delete(name);
};

function embedded(name) {
  for (const block of document.querySelectorAll('script[data-name]'))
    if (block.dataset.name === name) return JSON.parse(block.textContent);
  return undefined;
}

function load(name, fresh = false) {
  if (data.has(name) && !fresh) return data.get(name);
  const found = new Promise((resolve, reject) => {
    const held = fresh ? undefined : embedded(name);
    if (held !== undefined) return resolve(held);
    waiting.set(name, [resolve, reject]);
    const script = document.createElement('script');
    script.src = `${start.folder}/${name}.js` + (fresh ? `?${Date.now()}` : '');
    script.onload = () => script.remove();
    script.onerror = () => { script.remove(); waiting.delete(name); reject(new Error(name)); };
    document.head.append(script);
  });
  if (!fresh) {
    data.set(name, found);
    found.catch(() => data.delete(name));
  }
  return found;
}

// A picture's address; a page of one file brings its pictures along.
const address = (path) => images?.[path] ?? path;

// ---------------------------------------------------------------- elements

function make(tag, attributes = {}, ...inside) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (name === 'class') element.className = value;
    else if (name.startsWith('on')) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value);
  }
  element.append(...inside.filter((x) => x !== null && x !== undefined));
  return element;
}

// A text as it is: characters that hide or turn what follows become numbers.
function shown(text, limit = TEXT) {
  const cut = text.length > limit ? `\n… ${text.length - limit} more characters` : '';
  return text.slice(0, limit).replace(UNSEEN, (c) =>
    c === '\n' || c === '\t' ? c : `\\u${c.codePointAt(0).toString(16).padStart(4, '0')}`) + cut;
}

const signed = (x) => (x > 0 ? '+' : x < 0 ? '−' : '±') + Math.abs(x).toFixed(3);
const digits = (x) => (x === null || x === undefined ? '–' : x.toFixed(3));
const way = (x) => (x > 1e-6 ? 'up' : x < -1e-6 ? 'down' : '');

function picture(path, what, attributes = {}) {
  if (!path) return make('div', {class: 'nothing'}, what);
  return make('img', {src: address(path), alt: what, loading: 'lazy', ...attributes});
}

const tag = (name) =>
  make('span', {class: `tag ${name.replaceAll(' ', '-')}`, title: start.filters[name]}, name);

// ---------------------------------------------------------------- the list

function take(source, rows) {
  const names = Object.keys(start.filters);
  const found = rows.map((row, place) => {
    const entry = Object.fromEntries(entryNames.map((name, i) => [name, row[i]]));
    entry.labels = entry.labels.map((i) => names[i]);
    return {...entry, source, place, id: `${source.name}/${entry.number}`};
  });
  state.known.set(source.key, found);
}

function gather() {
  state.rows = start.sources.flatMap((source) => state.known.get(source.key) ?? []);
}

const missing = (x) => x === null || x === undefined;
const SORTS = {
  'newest': null,
  'oldest': (a, b) => b.order - a.order,
  'reward, highest': by((r) => r.reward, -1),
  'reward, lowest': by((r) => r.reward, 1),
  'improvement, highest': by((r) => r.gain, -1),
  'improvement, lowest': by((r) => r.gain, 1),
  'rule and judge apart': by((r) => r.disagreement, -1),
  'advantage, highest': by((r) => r.advantage, -1),
  'advantage, lowest': by((r) => r.advantage, 1),
  'most flags': by((r) => r.labels.filter((x) => x === 'flagged' || x === 'undecided').length, -1),
  'chart': (a, b) => (a.chart < b.chart ? -1 : a.chart > b.chart ? 1 : 0),
};

function by(value, sign) {  // what has no value comes last
  return (a, b) => {
    const x = value(a), y = value(b);
    if (missing(x) || missing(y)) return missing(x) - missing(y);
    return sign * (x - y);
  };
}

const inGroup = (row) => !byId('group').value || row.source.group === byId('group').value;

function words() {
  return byId('search').value.toLowerCase().split(/\s+/).filter(Boolean);
}

function matches(row, all) {
  const text = `${row.chart} ${row.id} ${row.found} step ${row.source.step}`.toLowerCase();
  return all.every((word) => text.includes(word) || row.deep?.includes(word));
}

function refresh(page = 0) {
  const all = words();
  const inside = state.rows.filter((row) => inGroup(row) && matches(row, all));
  for (const button of byId('filters').children) {
    const count = inside.filter((row) => row.labels.includes(button.dataset.show)).length;
    button.textContent = `${button.dataset.show} ${count}`;
    button.disabled = !count && button.getAttribute('aria-pressed') !== 'true';
  }
  state.shown = inside.filter((row) => [...state.wanted].every((x) => row.labels.includes(x)));
  state.shown.forEach((row, i) => { row.order = i; });
  const order = SORTS[byId('sort').value];
  if (order) state.shown.sort((a, b) => order(a, b) || a.order - b.order);
  byId('count').textContent = state.shown.length === state.rows.length
    ? `${state.rows.length} trajectories`
    : `${state.shown.length} of ${state.rows.length} trajectories`;
  turnTo(page);
}

function turnTo(page) {
  const pages = Math.max(1, Math.ceil(state.shown.length / PER_PAGE));
  state.page = Math.min(Math.max(page, 0), pages - 1);
  const first = state.page * PER_PAGE;
  byId('list').replaceChildren(
    ...state.shown.slice(first, first + PER_PAGE).map((row, i) => card(row, first + i)));
  byId('place').textContent = `page ${state.page + 1} of ${pages}`;
  byId('before').disabled = state.page === 0;
  byId('after').disabled = state.page === pages - 1;
  byId('pages').hidden = pages === 1;
}

function card(row, place) {
  const button = make('button', {type: 'button', class: 'card', 'data-place': place,
    onclick: () => open(place)},
    make('div', {class: 'pair'}, picture(row.target, 'no target'),
      picture(row.render, 'no picture')),
    make('h3', {}, shown(row.chart, 200)),
    make('p', {}, `reward ${digits(row.reward)} `,
      make('span', {class: `number ${way(row.gain)}`, title: 'last turn minus first turn'},
        signed(row.gain))),
    make('p', {class: 'soft'}, row.source.group + (row.source.step ? `, step ${row.source.step}` : '')),
    make('div', {}, ...row.labels.map(tag)));
  return make('li', {}, button);
}

// ---------------------------------------------------------------- one trajectory

const chunkOf = (row) => `${row.source.key}/${Math.floor(row.place / row.source.chunk)}`;

async function open(place) {
  const row = state.shown[place];
  if (!row) return;
  state.at = place;
  byId('one-title').textContent = `${shown(row.chart, 200)} · ${row.id}`;
  byId('one-before').disabled = place === 0;
  byId('one-after').disabled = place === state.shown.length - 1;
  byId('one-body').replaceChildren('loading …');
  if (!byId('one').open) byId('one').showModal();
  byId('one').scrollTop = 0;
  if (location.hash !== `#${row.id}`) history.replaceState(null, '', `#${row.id}`);
  let body;
  try {
    const chunk = await load(chunkOf(row));
    body = trajectory(row, chunk[row.place % row.source.chunk]);
  } catch (error) {
    body = [make('p', {class: 'error'}, `cannot load ${error.message}: is the folder ` +
      `${start.folder}/ still beside this page?`)];
  }
  if (state.at === place) byId('one-body').replaceChildren(...body);
}

function trajectory(row, one) {
  const turns = one.turns;
  const facts = [['advantage', signed(row.advantage)], ['improvement', signed(row.gain)],
    ['rule and judge apart', row.disagreement === null ? null : digits(row.disagreement)]];
  const pictures = make('div', {class: 'pictures'},
    make('figure', {}, picture(one.target, 'the target was not kept'),
      make('figcaption', {}, make('b', {}, 'target'))));
  turns.forEach((turn, i) => {
    pictures.append(make('figure', {},
      picture(turn.render, turn.status, {alt: `render of turn ${i + 1}`}),
      make('figcaption', {}, make('b', {}, `turn ${i + 1}`), ` ${turn.status}`)));
    if (turn.render && one.target) pictures.append(make('figure', {},
      make('div', {class: 'difference'}, picture(one.target, ''), picture(turn.render, '')),
      make('figcaption', {}, `turn ${i + 1} and target: white where they agree`)));
  });
  return [
    make('div', {}, ...row.labels.map(tag)),
    make('dl', {}, ...facts.filter(([, value]) => value !== null).map(([name, value]) =>
      make('div', {}, make('dt', {}, name), make('dd', {}, value)))),
    pictures,
    make('div', {class: 'turns'}, ...turns.map((turn, i) => turnView(turn, i, turns[i - 1]))),
    row.source.again ? make('p', {class: 'soft'}, 'sample it again: ', make('code', {},
      `python -m mmrecoder_jax.replay --workdir=${start.workdir} --id=${row.id}`)) : '',
  ];
}

function turnView(turn, i, before) {
  const parts = [make('h3', {}, `turn ${i + 1}`), bars(turn)];
  if (turn.flags.length || !turn.finished) parts.push(make('p', {},
    ...turn.flags.map((flag) => make('span', {class: 'tag flagged'}, flag.replaceAll('_', ' '))),
    turn.finished ? null : make('span', {class: 'tag'}, 'cut at the length limit')));
  if (turn.code === null) parts.push(
    make('p', {class: 'error'}, 'no code in this response:'),
    make('pre', {class: 'thought'}, shown(turn.thought)));
  else {
    if (turn.thought) parts.push(make('details', {},
      make('summary', {}, `thought, ${turn.thought.length} characters`),
      make('pre', {class: 'thought'}, shown(turn.thought))));
    parts.push(listing(turn.code, before?.code ?? null));
  }
  if (turn.error)
    parts.push(make('pre', {class: 'error'}, `${turn.status}: ${shown(turn.error)}`));
  if (turn.tokens) parts.push(tokens(turn));
  return make('div', {}, ...parts);
}

function bars(turn) {
  const {overall, ...parts} = turn.scores;
  const rows = [['reward', turn.reward, 'whole'], ['format', turn.format], ['rule', overall],
    ...Object.entries(parts).map(([name, value]) => [`· ${name}`, value]), ['judge', turn.judge]];
  return make('div', {class: 'bars'}, ...rows.filter(([, value]) => !missing(value))
    .flatMap(([name, value, kind = '']) => {
      const inside = make('span');
      inside.style.width = `${100 * Math.min(Math.max(value, 0), 1)}%`;
      return [make('span', {class: kind}, shown(name)), make('div', {class: `bar ${kind}`}, inside),
        make('span', {class: kind}, digits(value))];
    }));
}

// The code of a turn; lines that the turn before does not have are +, those it has more are -.
function listing(code, before) {
  const all = code.trimEnd().split('\n'), now = all.slice(0, LINES);
  const was = before === null ? null : before.trimEnd().split('\n').slice(0, LINES);
  const lines = was === null ? now.map((text) => [' ', text]) : difference(was, now);
  const more = all.length > LINES ? [[' ', `… ${all.length - LINES} more lines`]] : [];
  return make('pre', {class: 'code'}, ...[...lines, ...more].map(([mark, text]) =>
    make('span', {'data-mark': mark, class: mark === '+' ? 'new' : mark === '-' ? 'old' : null},
      shown(text, 2000) + '\n')));
}

function difference(was, now) {  // longest common subsequence of lines
  const width = now.length + 1, best = new Uint16Array((was.length + 1) * width);
  for (let i = was.length - 1; i >= 0; i--)
    for (let j = now.length - 1; j >= 0; j--)
      best[i * width + j] = was[i] === now[j] ? best[(i + 1) * width + j + 1] + 1
        : Math.max(best[(i + 1) * width + j], best[i * width + j + 1]);
  const lines = [];
  let i = 0, j = 0;
  while (i < was.length || j < now.length) {
    if (i < was.length && j < now.length && was[i] === now[j]) {
      lines.push([' ', now[j]]);
      i += 1;
      j += 1;
    } else if (j >= now.length || (i < was.length &&
      best[(i + 1) * width + j] >= best[i * width + j + 1])) lines.push(['-', was[i++]]);
    else lines.push(['+', now[j++]]);
  }
  return lines;
}

function tokens(turn) {
  const inside = make('pre', {class: 'tokens'});
  const details = make('details', {}, make('summary', {},
    `${turn.sampled} tokens, by how unlikely each was`), inside);
  details.addEventListener('toggle', () => {
    if (inside.childNodes.length) return;
    for (const [text, id, logp] of turn.tokens) {
      const one = make('span', {title: `id ${id}, log-probability ${logp.toFixed(3)}, ` +
        `probability ${Math.exp(logp).toFixed(3)}`}, shown(text));
      one.style.setProperty('--doubt', (1 - Math.exp(logp)).toFixed(3));
      inside.append(one);
    }
    if (turn.sampled > turn.tokens.length)
      inside.append(`\n… ${turn.sampled - turn.tokens.length} more tokens`);
  });
  return details;
}

// ---------------------------------------------------------------- what a reader does

async function searchDeep() {  // reads all details, newest first, and looks into their texts
  const note = byId('loading');
  const chunks = new Map();
  for (const row of state.rows) {
    if (row.deep !== undefined) continue;
    if (!chunks.has(chunkOf(row))) chunks.set(chunkOf(row), []);
    chunks.get(chunkOf(row)).push(row);
  }
  let done = 0;
  for (const [name, rows] of chunks) {
    if (!byId('deep').checked) break;
    const details = await load(name).catch(() => null);
    data.delete(name);  // their texts are kept, no more
    for (const row of rows) {
      const turns = details?.[row.place % row.source.chunk]?.turns ?? [];
      row.deep = turns.map((t) => `${t.code ?? ''} ${t.thought} ${t.error}`).join(' ').toLowerCase();
    }
    if (++done % 20 === 0) note.textContent = `reading code: ${done} of ${chunks.size} files`;
  }
  note.textContent = '';
  refresh();
}

function tools() {
  byId('sort').replaceChildren(...Object.keys(SORTS).map((name) => make('option', {}, name)));
  byId('filters').replaceChildren(...Object.entries(start.filters).map(([name, meaning]) =>
    make('button', {type: 'button', 'aria-pressed': 'false', title: meaning, 'data-show': name,
      onclick: (event) => {
        const button = event.currentTarget;
        const on = button.getAttribute('aria-pressed') !== 'true';
        button.setAttribute('aria-pressed', on);
        state.wanted[on ? 'add' : 'delete'](name);
        refresh();
      }}, name)));
  for (const id of ['group', 'sort']) byId(id).addEventListener('change', () => refresh());
  byId('search').addEventListener('input', () => refresh());
  byId('search').form.addEventListener('submit', (event) => event.preventDefault());
  byId('deep').addEventListener('change', () => byId('deep').checked && searchDeep());
  byId('before').addEventListener('click', () => turnTo(state.page - 1));
  byId('after').addEventListener('click', () => turnTo(state.page + 1));
  byId('one-before').addEventListener('click', () => open(state.at - 1));
  byId('one-after').addEventListener('click', () => open(state.at + 1));
  byId('close').addEventListener('click', () => byId('one').close());
  byId('one').addEventListener('close', () => {
    history.replaceState(null, '', '#trajectories');
    turnTo(Math.floor(state.at / PER_PAGE));
    document.querySelector(`[data-place="${state.at}"]`)?.focus();
    state.at = -1;
  });
  document.addEventListener('keydown', key);
}

function key(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = event.target.matches('input[type=search], select');
  if (typing) {
    if (event.key === 'Escape') event.target.blur();
    return;
  }
  const step = {j: 1, k: -1}[event.key];
  if (byId('one').open) {
    if (step && state.shown[state.at + step]) open(state.at + step);
    return;
  }
  if (event.key === '/') {
    event.preventDefault();
    byId('search').focus();
  } else if (event.key === 'n') turnTo(state.page + 1);
  else if (event.key === 'p') turnTo(state.page - 1);
  else if (step) move(step);
}

function move(step) {  // to the next card, over the ends of a page
  const here = document.activeElement?.dataset?.place;
  const first = state.page * PER_PAGE;
  const place = here === undefined ? first : Number(here) + step;
  if (place < 0 || place >= state.shown.length) return;
  if (Math.floor(place / PER_PAGE) !== state.page) turnTo(Math.floor(place / PER_PAGE));
  document.querySelector(`[data-place="${place}"]`)?.focus();
}

// ---------------------------------------------------------------- begin, and go on

function groups() {
  const names = [...new Set(start.sources.map((source) => source.group))];
  const before = byId('group').value;
  byId('group').replaceChildren(make('option', {value: ''}, 'everywhere'),
    ...names.map((name) => make('option', {value: name}, name)));
  byId('group').value = names.includes(before) ? before : '';
}

async function read() {
  const wanted = start.sources.filter((source) => !state.known.has(source.key));
  let done = 0;
  byId('loading').textContent = '';
  await Promise.all(wanted.map(async (source) => {
    try {
      take(source, await load(`${source.key}/list`));
    } catch {
      byId('loading').textContent = `some trajectories cannot be loaded: is the folder ` +
        `${start.folder}/ still beside this page?`;
    }
    if (++done % 20 === 0) byId('loading').textContent = `reading ${done} of ${wanted.length}`;
  }));
  if (byId('loading').textContent.startsWith('reading ')) byId('loading').textContent = '';
  const keys = new Set(start.sources.map((source) => source.key));
  for (const key of state.known.keys()) if (!keys.has(key)) state.known.delete(key);
  gather();
  byId('viewer').hidden = !state.rows.length;
  if (!state.rows.length) byId('loading').textContent ||= 'No trajectory has been written yet.';
  return wanted.length;
}

// A live page: parts whose content has changed are replaced, what a reader has opened stays open.
async function look() {
  try {
    const now = await load('now', true);
    for (const [name, html] of Object.entries(now.parts)) {
      const part = byId(`part-${name}`);
      if (part.dataset.is === now.marks[name]) continue;
      const opened = [...part.querySelectorAll('details[open]')].map((x) => x.dataset.key);
      const closed = [...part.querySelectorAll('details:not([open])')].map((x) => x.dataset.key);
      part.innerHTML = html;  // made and escaped by our own Python
      part.dataset.is = now.marks[name];
      for (const fold of part.querySelectorAll('details')) {
        if (opened.includes(fold.dataset.key)) fold.open = true;
        if (closed.includes(fold.dataset.key)) fold.open = false;
      }
      hideEmpty();
    }
    start.sources = now.sources;
    const before = state.rows.length;
    if (await read() || state.rows.length !== before) {
      groups();
      if (byId('one').open) {  // its place stays its own
        const id = state.shown[state.at]?.id;
        refresh(state.page);
        state.at = state.shown.findIndex((row) => row.id === id);
      } else refresh(state.page);
    }
    document.body.dataset.live = 'yes';
  } catch {
    byId('loading').textContent = 'The server does not answer: is the command still running?';
  }
  setTimeout(look, 1000 * start.seconds);
}

function hideEmpty() {
  for (const part of document.querySelectorAll('.part'))
    if (part.parentElement.tagName === 'SECTION')
      part.parentElement.hidden = !part.childNodes.length;
}

async function begin() {
  start = embedded('start');
  entryNames = start.entry;
  images = embedded('images');
  hideEmpty();
  tools();
  groups();
  await read();
  refresh();
  const id = decodeURIComponent(location.hash.slice(1));
  const place = state.shown.findIndex((row) => row.id === id);
  if (place >= 0) open(place);
  document.body.dataset.ready = state.rows.length;
  if (start.seconds) look();
}

begin();
