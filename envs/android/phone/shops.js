"use strict";
/* The browser, and the two shops in it: they sell different things and look and work differently. */

const SITES = { amberly: "amberly.com", voltmart: "voltmart.com" };
const site = (screen) => DATA.shops[screen.site];
const price = (cents) => "$" + (cents / 100).toFixed(2);
const find = (name, words) => DATA.shops[name].products.filter((p) => words.split(/\s+/).every((w) => (p.name + " " + p.department).toLowerCase().includes(w)));
const product = (screen) => site(screen).products.find((p) => p.id === screen.product);
const GLYPHS = [
  '<rect x="6" y="4" width="12" height="16" rx="2"/>', '<circle cx="12" cy="12" r="7"/><circle cx="12" cy="12" r="2"/>', '<path d="M4 16V9l8-4 8 4v7l-8 4z"/>',
  '<path d="M5 10a7 7 0 0114 0v7h-4v-6M5 10v7h4v-6"/>', '<path d="M7 4h10l2 16H5z"/>', '<path d="M4 18l4-10h8l4 10z"/>',
];
const photo = (p, cls = "") => `<span class="photo ${cls}" style="background:hsl(${hue(p.name)} 55% 88%);color:hsl(${hue(p.name)} 55% 38%)">${svg(GLYPHS[hue(p.name + "?") % GLYPHS.length])}</span>`;
const stars = (p) => `<span class="stars">${"★".repeat(p.stars)}${"☆".repeat(5 - p.stars)}</span>`;
const inCart = (name) => S.carts[name].reduce((sum, line) => sum + line.count, 0);

function address(screen) {
  if (!screen.site) return "";
  const rest = { main: "", results: "/search?q=" + (screen.q || ""), department: "/" + (screen.department || ""), product: "/item/" + (screen.product || ""), cart: "/cart", menu: "/menu", find: "/search" }[screen.page];
  return SITES[screen.site] + rest;
}
function chrome(screen) {
  const url = S.focus === "url" ? field("url", "Search or type an address", "visit") : `<label class="field" data-a="edit_url"><span class="url">${h(address(screen)) || "<i>Search or type an address</i>"}</span></label>`;
  return `<header class="browser">${url}</header>`;
}
const SHOPS = {
  /* Search field always on top, departments as chips, results as a list, "Add to cart" on the product. */
  amberly(screen) {
    const head = `<div class="amber"><b data-a="visit_site:amberly">amberly</b>${field("amberly_q", "Search Amberly", "shop_search")}<button class="icon" data-a="cart">${ICONS.cart}<em>${inCart("amberly")}</em></button></div>`;
    const list = (items, q) => each(items, (p) => `<div class="item" data-a="product:${p.id}${q ? "=" + h(q) : ""}">${photo(p)}<div class="grow"><div class="t">${h(p.name)}</div>${stars(p)}<div class="price">${price(p.cents)}</div></div></div>`);
    const chips = `<div class="chips">${each(site(screen).departments, (d) => `<span data-a="department:${h(d)}">${h(d)}</span>`)}</div>`;
    if (screen.page === "results") {
      const found = find("amberly", screen.q);
      return head + body(`<p class="count">${found.length} results for “${h(screen.q)}”</p>${list(found, screen.q) || empty("Nothing matches")}`);
    }
    if (screen.page === "department") return head + body(`<h3>${h(screen.department)}</h3>` + list(site(screen).products.filter((p) => p.department === screen.department)));
    if (screen.page === "product") {
      const p = product(screen);
      return head + body(`${photo(p, "big")}<div class="head left"><h2>${h(p.name)}</h2>${stars(p)}<div class="price">${price(p.cents)}</div><p>In stock. ${h(p.department)}.</p></div>${button("buy:" + p.id, "Add to cart", "amberish")}`);
    }
    if (screen.page === "cart") return head + body(`<h3>Your cart</h3>${cartLines("amberly")}`);
    return head + body(`<div class="banner">Autumn sale<small>up to 40% off</small></div><h3>Departments</h3>${chips}<h3>For you</h3>${list(site(screen).products.slice(0, 4))}`);
  },
  /* A menu page for departments, a page of its own for search, results as a grid, "Buy" bar at the bottom. */
  voltmart(screen) {
    const head = `<div class="volt">${icon("shop_page:menu", "menu", "menu")}<b data-a="visit_site:voltmart">VOLTMART</b><span class="grow"></span>${icon("shop_page:find", "search", "search")}<button class="icon" data-a="cart">${ICONS.cart}<em>${inCart("voltmart")}</em></button></div>`;
    const grid = (items, q) => `<div class="tiles">${each(items, (p) => `<div class="tileitem" data-a="product:${p.id}${q ? "=" + h(q) : ""}">${photo(p)}<div class="price">${price(p.cents)}</div><div class="t">${h(p.name)}</div></div>`)}</div>`;
    if (screen.page === "menu") return head + body(`<h3>All departments</h3>${each(site(screen).departments, (d) => row("department:" + d, d, "", ICONS.chevron))}`);
    if (screen.page === "find") return head + body(field("voltmart_q", "What are you looking for?", "shop_search") + button("shop_search", "Search", "voltish"));
    if (screen.page === "results") {
      const found = find("voltmart", screen.q);
      return head + body(`<p class="count">“${h(screen.q)}” (${found.length})</p>${found.length ? grid(found, screen.q) : empty("No match")}`);
    }
    if (screen.page === "department") return head + body(`<h3>${h(screen.department)}</h3>` + grid(site(screen).products.filter((p) => p.department === screen.department)));
    if (screen.page === "product") {
      const p = product(screen);
      return head + body(`${photo(p, "big")}<div class="head left"><h2>${h(p.name)}</h2><p>Item ${p.id} · ${h(p.department)}</p>${stars(p)}</div>`) + `<footer class="buybar"><b>${price(p.cents)}</b>${button("buy:" + p.id, "Buy", "voltish")}</footer>`;
    }
    if (screen.page === "cart") return head + body(`<h3>Basket</h3>${cartLines("voltmart")}`);
    return head + body(`<div class="banner dark">Weekend deals<small>new every Friday</small></div>${grid(site(screen).products.slice(0, 6))}`);
  },
};
function cartLines(name) {
  const lines = S.carts[name];
  if (!lines.length) return empty("Nothing here yet");
  const sum = lines.reduce((total, line) => total + line.count * DATA.shops[name].products.find((p) => p.id === line.id).cents, 0);
  return each(lines, (line) => {
    const p = DATA.shops[name].products.find((x) => x.id === line.id);
    return `<div class="item">${photo(p)}<div class="grow"><div class="t">${h(p.name)}</div><div class="price">${price(p.cents)}</div><div class="stepper"><span data-a="less:${p.id}">−</span>${line.count}<span data-a="more:${p.id}">+</span></div></div></div>`;
  }) + `<div class="row"><div class="grow t">Total</div><b>${price(sum)}</b></div>`;
}
APPS.browser = {
  title: "Browser",
  colour: "#fb8c00",
  icon: '<circle cx="12" cy="12" r="8.5"/><path d="M3.5 12h17M12 3.5c-5 5-5 12 0 17M12 3.5c5 5 5 12 0 17"/>',
  render(screen) {
    if (screen.site) return chrome(screen) + SHOPS[screen.site](screen);
    const sites = each(Object.entries(SITES), ([id, url]) => `<div class="app" data-a="visit_site:${id}"><span class="tile ${id}">${id[0].toUpperCase()}</span>${h(url)}</div>`);
    return chrome(screen) + body(screen.page === "lost" ? `<div class="lost"><h2>Page not found</h2><p>${h(screen.url)} could not be reached.</p></div>` : `<h3>Bookmarks</h3><div class="grid two">${sites}</div>`);
  },
};
const there = (screen) => go({ app: "browser", site: top_().site, ...screen });
VERBS.edit_url = () => {
  forget("url");
  S.focus = "url";
};
VERBS.visit_site = (name) => go({ app: "browser", site: name, page: "main" });
VERBS.visit = () => {
  const url = value("url").toLowerCase().replace(/^https?:\/\//, "").replace(/^www\./, "").replace(/\/$/, "");
  const found = Object.entries(SITES).find(([, address]) => address === url);
  if (found) VERBS.visit_site(found[0]);
  else go({ app: "browser", page: "lost", url });
};
VERBS.shop_page = (page) => {
  forget("voltmart_q");
  there({ page });
};
VERBS.shop_search = () => {
  const q = value(top_().site + "_q").toLowerCase();
  if (!q) return (S.toast = "Type what to search for");
  there({ page: "results", q });
};
VERBS.department = (department) => there({ page: "department", department });
VERBS.product = (argument) => {
  const [id, q] = argument.split("=");
  there({ page: "product", product: id, ...(q ? { q } : {}) });
};
VERBS.cart = () => there({ page: "cart" });
function change(id, by) {
  const name = top_().site;
  const line = S.carts[name].find((x) => x.id === id);
  if (line) line.count += by;
  else S.carts[name].push({ id, count: 1 });
  S.carts[name] = S.carts[name].filter((x) => x.count > 0);
}
VERBS.buy = (id) => {
  change(id, 1);
  S.toast = "Added to your cart";
};
VERBS.more = (id) => change(id, 1);
VERBS.less = (id) => change(id, -1);
