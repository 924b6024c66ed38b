"use strict";
/* The phone: one state object S, and a view of it. Every screen is a pure function of S, so a loaded state looks the
   same as one reached by hand. Elements that can be tapped have data-a="verb:argument". */
let S;
const APPS = {}; // name -> {title, colour, icon, render(screen) -> html}
const VERBS = {}; // verb -> function(argument)

const ESCAPES = { "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;" };
const h = (text) => String(text).replace(/[&<>"']/g, (c) => ESCAPES[c]);
const each = (list, make) => list.map(make).join("");
const svg = (inner, box = 24) => `<svg viewBox="0 0 ${box} ${box}">${inner}</svg>`;
const ICONS = {
  back: svg('<path d="M15 5l-7 7 7 7"/>'),
  plus: svg('<path d="M12 5v14M5 12h14"/>'),
  search: svg('<circle cx="10.5" cy="10.5" r="6"/><path d="M15 15l5 5"/>'),
  menu: svg('<path d="M4 7h16M4 12h16M4 17h16"/>'),
  cart: svg('<path d="M3 4h3l2 11h10l2-8H7"/><circle cx="9" cy="19" r="1.5"/><circle cx="17" cy="19" r="1.5"/>'),
  chevron: svg('<path d="M9 5l7 7-7 7"/>'),
  left: svg('<path d="M15 5l-7 7 7 7"/>'),
  star: svg('<path d="M12 4l2.5 5.2 5.5.8-4 4 1 5.8-5-2.8-5 2.8 1-5.8-4-4 5.5-.8z"/>'),
  starred: svg('<path fill="currentColor" d="M12 4l2.5 5.2 5.5.8-4 4 1 5.8-5-2.8-5 2.8 1-5.8-4-4 5.5-.8z"/>'),
  trash: svg('<path d="M5 7h14M10 7V4h4v3M7 7l1 13h8l1-13"/>'),
  phone: svg('<path d="M6 4l4 1 1 4-2 2c1 2 2 3 4 4l2-2 4 1 1 4c-8 3-17-6-14-14z"/>'),
  mail: svg('<path d="M4 5h16v11H11l-5 4v-4H4z"/>'),
  send: svg('<path d="M4 12l16-8-5 16-4-6z"/>'),
  pin: svg('<path d="M12 21c-4-6-6-8-6-11a6 6 0 0112 0c0 3-2 5-6 11z"/><circle cx="12" cy="10" r="2"/>'),
};

/* ---- screens */

const top_ = () => S.stack[S.stack.length - 1];
function leave() {
  S.focus = null;
  S.toast = "";
}
function go(screen) {
  leave();
  S.stack.push(screen);
}
function back() {
  leave();
  if (S.stack.length > 1) S.stack.pop();
}
function home() {
  leave();
  S.stack = [{ app: "launcher", page: "home" }];
}
/* Close a form and show a message. */
function done(message) {
  back();
  S.toast = message;
}

/* ---- parts of a screen */

const icon = (id, name, label = "") => `<button class="icon" data-a="${h(id)}" aria-label="${h(label)}">${ICONS[name]}</button>`;
const bar = (title, buttons = "", colour = "") =>
  `<header class="bar ${colour}">${icon("back", "back", "back")}<h1>${h(title)}</h1>${buttons}</header>`;
const body = (html, cls = "") => `<main class="body ${cls}">${html}</main>`;
const row = (id, title, sub = "", right = "", left = "") =>
  `<div class="row" data-a="${h(id)}">${left}<div class="grow"><div class="t">${h(title)}</div>${sub ? `<div class="s">${h(sub)}</div>` : ""}</div>${right}</div>`;
const plain = (title, sub = "") => `<div class="row"><div class="grow"><div class="t">${h(title)}</div><div class="s">${h(sub)}</div></div></div>`;
const toggle = (on) => `<span class="switch ${on ? "on" : ""}"><i></i></span>`;
const button = (id, text, cls = "") => `<button class="wide ${cls}" data-a="${h(id)}">${h(text)}</button>`;
const fab = (id, name = "plus") => `<button class="fab" data-a="${h(id)}">${ICONS[name]}</button>`;
const empty = (text) => `<p class="empty">${h(text)}</p>`;
const hue = (text) => [...text].reduce((sum, c) => (sum * 31 + c.codePointAt(0)) % 360, 7);
const avatar = (name) => `<span class="avatar" style="background:hsl(${hue(name)} 45% 50%)">${h(name[0])}</span>`;
function field(name, hint, enter = "") {
  const value = S.fields[name] || "";
  const clear = value ? `<span class="clear" data-a="clear:${name}">×</span>` : "";
  return `<label class="field"><input data-field="${name}" data-enter="${enter}" placeholder="${h(hint)}" value="${h(value)}" autocomplete="off" spellcheck="false">${clear}</label>`;
}
const value = (name) => (S.fields[name] || "").trim();
function forget(...names) {
  for (const name of names) delete S.fields[name];
}

/* ---- drawing */

function statusBar() {
  const on = (key, path) => (S.settings[key] ? svg(path) : "");
  return `<div class="status"><b>${h(S.time)}</b><span class="grow"></span>${on("do_not_disturb", '<circle cx="12" cy="12" r="8"/><path d="M8 12h8"/>')}${on("airplane_mode", '<path d="M12 3v6l8 5v2l-8-2v4l2 2H10l2-2v-4l-8 2v-2l8-5z"/>')}${on("bluetooth", '<path d="M7 8l10 8-5 4V4l5 4L7 16"/>')}${on("wifi", '<path d="M3 10a13 13 0 0118 0M6 13.5a8.5 8.5 0 0112 0M9.5 17a4 4 0 015 0"/>')}<span class="battery ${S.settings.battery_saver ? "low" : ""}"><i></i></span></div>`;
}
function draw() {
  const screen = top_();
  const old = document.querySelector(".body");
  const scroll = old && document.body.dataset.screen === JSON.stringify(screen) ? old.scrollTop : 0;
  document.body.className = (S.settings.dark_mode ? "dark " : "") + "font-" + S.settings.font_size.toLowerCase().replace(" ", "-");
  document.body.innerHTML = `<div class="phone app-${screen.app}" style="--hue:${S.wallpaper}">${statusBar()}<section class="screen">${APPS[screen.app].render(screen)}</section>${S.toast ? `<div class="toast">${h(S.toast)}</div>` : ""}</div>`;
  document.body.dataset.screen = JSON.stringify(screen);
  const now = document.querySelector(".body");
  if (now) now.scrollTop = scroll;
  const input = S.focus && document.querySelector(`[data-field="${S.focus}"]`);
  if (input) {
    input.focus({ preventScroll: true });
    input.setSelectionRange(input.value.length, input.value.length);
  } else S.focus = null;
}
function run(id) {
  const colon = id.indexOf(":");
  const verb = colon < 0 ? id : id.slice(0, colon);
  const before = S.toast;
  VERBS[verb](colon < 0 ? "" : id.slice(colon + 1));
  if (S.toast === before) S.toast = "";
  draw();
}
document.addEventListener("click", (event) => {
  const target = event.target.closest("[data-a]");
  if (target) return run(target.dataset.a);
  const input = event.target.closest("[data-field]");
  S.focus = input ? input.dataset.field : null;
  S.toast = "";
  draw();
});
document.addEventListener("input", (event) => {
  S.fields[event.target.dataset.field] = event.target.value;
  draw();
});
document.addEventListener("keydown", (event) => {
  const enter = event.target.dataset && event.target.dataset.enter;
  if (event.key === "Enter" && enter) run(enter);
});

Object.assign(VERBS, {
  open: (app) => go({ app, page: "main" }),
  back,
  clear: (name) => {
    forget(name);
    S.focus = name;
  },
});
APPS.launcher = {
  render: () =>
    `<main class="body wall"><div class="date"><b>${h(S.time)}</b><span>${h(S.date_text)}</span></div><div class="grid">${each(
      S.layout,
      (name) => `<div class="app" data-a="open:${name}"><span class="tile" style="background:${APPS[name].colour}">${svg(APPS[name].icon)}</span>${h(APPS[name].title)}</div>`
    )}</div></main>`,
};

/* ---- what a driver calls */

const phone = {
  load(state) {
    S = state;
    draw();
    return true;
  },
  key(name) {
    if (name === "home") home();
    if (name === "back") back();
    draw();
  },
  /* The state, and everything that can be tapped, in CSS pixels; `shown` where its centre is on screen and on top. */
  inspect() {
    const targets = [...document.querySelectorAll("[data-a], [data-field]")].map((element) => {
      const box = element.getBoundingClientRect();
      const x = box.x + box.width / 2;
      const y = box.y + box.height / 2;
      const hit = document.elementFromPoint(x, y);
      const shown = hit !== null && (element.contains(hit) || hit.contains(element)) && hit.closest("[data-a], [data-field]") === element;
      return { id: element.dataset.a || "field:" + element.dataset.field, x, y, shown };
    });
    return { state: { ...S, screen: top_() }, targets };
  },
};
