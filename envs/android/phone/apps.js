"use strict";
/* Settings, clock, contacts, messages, notes, calendar, weather, maps. */

/* ---- settings */

const TOGGLES = {
  network: [["wifi", "Wi-Fi"], ["bluetooth", "Bluetooth"], ["mobile_data", "Mobile data"], ["airplane_mode", "Airplane mode"], ["hotspot", "Hotspot"]],
  display: [["dark_mode", "Dark theme"], ["auto_rotate", "Auto-rotate"], ["adaptive_brightness", "Adaptive brightness"]],
  sound: [["do_not_disturb", "Do not disturb"], ["vibrate", "Vibrate for calls"], ["touch_sounds", "Touch sounds"]],
  battery: [["battery_saver", "Battery saver"], ["battery_percentage", "Battery percentage"]],
  privacy: [["location", "Location"], ["camera_access", "Camera access"], ["microphone_access", "Microphone access"]],
};
const CHOICES = {
  font_size: ["Font size", "display", ["Small", "Default", "Large", "Very large"]],
  timeout: ["Screen timeout", "display", ["15 seconds", "30 seconds", "1 minute", "5 minutes", "10 minutes"]],
  ringtone: ["Ringtone", "sound", ["Aurora", "Bell", "Chime", "Drift", "Echo", "Marimba"]],
  language: ["Language", "system", ["English", "Deutsch", "Español", "Français", "Italiano", "Português"]],
};
const SECTIONS = [
  ["network", "Network & internet", "Wi-Fi, mobile, hotspot", 210],
  ["display", "Display", "Theme, font size, timeout", 30],
  ["sound", "Sound & vibration", "Ringtone, do not disturb", 330],
  ["battery", "Battery", "Saver, percentage", 130],
  ["privacy", "Privacy", "Location, camera, microphone", 265],
  ["system", "System", "Language, about phone", 0],
];
APPS.settings = {
  title: "Settings",
  colour: "#5f6b7a",
  icon: '<circle cx="12" cy="12" r="3.5"/><path d="M12 3v3M12 18v3M3 12h3M18 12h3M5.6 5.6l2.2 2.2M16.2 16.2l2.2 2.2M18.4 5.6l-2.2 2.2M7.8 16.2l-2.2 2.2"/>',
  render(screen) {
    if (screen.page === "main")
      return bar("Settings") + body(each(SECTIONS, ([id, title, sub, colour]) => row("page:" + id, title, sub, "", `<span class="dot" style="background:hsl(${colour} 60% 55%)"></span>`)));
    if (screen.page === "about") return bar("About phone") + body(plain("Device name", "Coso One") + plain("Android version", "16") + plain("Model", "CP-360"));
    if (CHOICES[screen.page]) {
      const [title, , values] = CHOICES[screen.page];
      return bar(title) + body(each(values, (v) => row(`choose:${screen.page}=${v}`, v, "", `<span class="radio ${S.settings[screen.page] === v ? "on" : ""}"></span>`)));
    }
    const rows = each(TOGGLES[screen.page] || [], ([key, title]) => row("toggle:" + key, title, S.settings[key] ? "On" : "Off", toggle(S.settings[key])));
    const choices = each(Object.entries(CHOICES).filter(([, c]) => c[1] === screen.page), ([key, [title]]) => row("page:" + key, title, S.settings[key], ICONS.chevron));
    const about = screen.page === "system" ? row("page:about", "About phone", "Coso One", ICONS.chevron) : "";
    return bar(SECTIONS.find((s) => s[0] === screen.page)[1]) + body(rows + choices + about);
  },
};
VERBS.page = (page) => go({ app: top_().app, page });
VERBS.toggle = (key) => {
  S.settings[key] = !S.settings[key];
  if (key === "airplane_mode" && S.settings.airplane_mode) S.settings.wifi = S.settings.bluetooth = S.settings.mobile_data = false;
};
VERBS.choose = (pair) => {
  const [key, chosen] = pair.split("=");
  S.settings[key] = chosen;
};

/* ---- clock */

const MINUTES = [1, 2, 3, 5, 7, 10, 15, 20, 25, 30, 45, 60];
APPS.clock = {
  title: "Clock",
  colour: "#3949ab",
  icon: '<circle cx="12" cy="12" r="8.5"/><path d="M12 7v5l4 2"/>',
  render(screen) {
    const tabs = `<nav class="tabs">${each([["main", "Alarm"], ["timer", "Timer"]], ([id, title]) => `<span class="${screen.page === id ? "on" : ""}" data-a="tab:${id}">${title}</span>`)}</nav>`;
    if (screen.page === "new")
      return bar("New alarm") + body(field("alarm_time", "Time, for instance 07:30", "save_alarm") + field("alarm_label", "Label", "save_alarm") + button("save_alarm", "Save"));
    if (screen.page === "timer") {
      const t = S.timer;
      return bar("Clock") + tabs + body(`<div class="dial">${t ? t.minutes + ":00" : "--:--"}<small>${t ? "running" : "no timer"}</small></div><div class="chips">${each(MINUTES, (m) => `<span data-a="timer:${m}">${m} min</span>`)}</div>${t ? button("timer:0", "Stop", "quiet") : ""}`);
    }
    return bar("Clock") + tabs + body(each(S.alarms, (a) => row("alarm:" + a.time, a.time, a.label || "Alarm", `${icon("drop_alarm:" + a.time, "trash", "delete")}${toggle(a.on)}`))) + fab("new_alarm");
  },
};
VERBS.tab = (page) => {
  S.stack[S.stack.length - 1] = { app: "clock", page };
};
VERBS.new_alarm = () => {
  forget("alarm_time", "alarm_label");
  go({ app: "clock", page: "new" });
};
VERBS.save_alarm = () => {
  const time = value("alarm_time").padStart(5, "0");
  if (!/^([01]\d|2[0-3]):[0-5]\d$/.test(time)) return (S.toast = "A time looks like 07:30");
  S.alarms = S.alarms.filter((a) => a.time !== time).concat({ time, label: value("alarm_label"), on: true }).sort((a, b) => (a.time < b.time ? -1 : 1));
  done("Alarm set for " + time);
};
VERBS.alarm = (time) => {
  const alarm = S.alarms.find((a) => a.time === time);
  alarm.on = !alarm.on;
};
VERBS.drop_alarm = (time) => {
  S.alarms = S.alarms.filter((a) => a.time !== time);
};
VERBS.timer = (minutes) => {
  S.timer = Number(minutes) ? { minutes: Number(minutes) } : null;
};

/* ---- contacts */

const byName = (list) => list.sort((a, b) => (a.name < b.name ? -1 : 1));
APPS.contacts = {
  title: "Contacts",
  colour: "#00897b",
  icon: '<circle cx="12" cy="8.5" r="3.5"/><path d="M5 20c0-4 3-6 7-6s7 2 7 6"/>',
  render(screen) {
    if (screen.page === "new")
      return bar("New contact") + body(field("contact_name", "Name", "save_contact") + field("contact_phone", "Phone", "save_contact") + button("save_contact", "Save"));
    if (screen.page === "call") return `<main class="body call">${avatar(screen.name)}<h2>${h(screen.name)}</h2><p>calling …</p>${button("back", "End call", "red")}</main>`;
    if (screen.page === "person") {
      const c = S.contacts.find((x) => x.name === screen.name);
      if (!c) return bar("Contact") + body(empty("This contact was deleted"));
      return (
        bar(c.name, icon("star_contact:" + c.name, c.star ? "starred" : "star", "star") + icon("drop_contact:" + c.name, "trash", "delete")) +
        body(`<div class="head">${avatar(c.name)}<h2>${h(c.name)}</h2><p>${h(c.phone)}</p></div>${row("call:" + c.name, "Call", c.phone, "", ICONS.phone)}${row("thread:" + c.name, "Message", "Open the conversation", "", ICONS.mail)}`)
      );
    }
    return bar("Contacts") + body(each(S.contacts, (c) => row("contact:" + c.name, c.name, c.phone, c.star ? ICONS.starred : "", avatar(c.name)))) + fab("new_contact");
  },
};
VERBS.new_contact = () => {
  forget("contact_name", "contact_phone");
  go({ app: "contacts", page: "new" });
};
VERBS.save_contact = () => {
  const name = value("contact_name");
  if (!name || !value("contact_phone")) return (S.toast = "A contact needs a name and a number");
  S.contacts = byName(S.contacts.filter((c) => c.name !== name).concat({ name, phone: value("contact_phone"), star: false }));
  done(name + " saved");
};
VERBS.contact = (name) => go({ app: "contacts", page: "person", name });
VERBS.star_contact = (name) => {
  const c = S.contacts.find((x) => x.name === name);
  c.star = !c.star;
};
VERBS.drop_contact = (name) => {
  S.contacts = S.contacts.filter((c) => c.name !== name);
  done(name + " deleted");
};
VERBS.call = (name) => {
  S.calls.push(name);
  go({ app: "contacts", page: "call", name });
};

/* ---- messages */

APPS.messages = {
  title: "Messages",
  colour: "#1e88e5",
  icon: '<path d="M4 5h16v11H11l-5 4v-4H4z"/>',
  render(screen) {
    if (screen.page === "thread") {
      const t = S.threads.find((x) => x.name === screen.name) || { messages: [] };
      const bubbles = each(t.messages, (m) => `<div class="bubble ${m.me ? "me" : ""}">${h(m.text)}</div>`);
      return bar(screen.name) + body(bubbles || empty("No messages yet"), "chat") + `<footer class="compose">${field("message", "Text message", "send:" + screen.name)}${icon("send:" + screen.name, "send", "send")}</footer>`;
    }
    if (screen.page === "new") return bar("New message") + body(each(S.contacts, (c) => row("thread:" + c.name, c.name, c.phone, "", avatar(c.name))));
    return bar("Messages") + body(each(S.threads, (t) => row("thread:" + t.name, t.name, t.messages[t.messages.length - 1].text, "", avatar(t.name)))) + fab("page:new");
  },
};
VERBS.thread = (name) => {
  forget("message");
  go({ app: "messages", page: "thread", name });
};
VERBS.send = (name) => {
  const text = value("message");
  if (!text) return (S.toast = "Nothing to send");
  let thread = S.threads.find((t) => t.name === name);
  if (!thread) S.threads.unshift((thread = { name, messages: [] }));
  thread.messages.push({ me: true, text });
  forget("message");
};

/* ---- notes */

APPS.notes = {
  title: "Notes",
  colour: "#f9a825",
  icon: '<path d="M6 3h12v18H6zM9 8h6M9 12h6M9 16h4"/>',
  render(screen) {
    if (screen.page === "new") return bar("New note") + body(field("note_title", "Title", "save_note") + field("note_body", "Text", "save_note") + button("save_note", "Save"));
    if (screen.page === "note") {
      const n = S.notes.find((x) => x.title === screen.title);
      return n ? bar(n.title, icon("drop_note:" + n.title, "trash", "delete")) + body(`<p class="text">${h(n.body)}</p>`) : bar("Note") + body(empty("This note was deleted"));
    }
    return bar("Notes") + body(`<div class="cards">${each(S.notes, (n) => `<div class="card" data-a="note:${h(n.title)}" style="--tint:${hue(n.title)}"><b>${h(n.title)}</b><p>${h(n.body)}</p></div>`)}</div>`) + fab("new_note");
  },
};
VERBS.new_note = () => {
  forget("note_title", "note_body");
  go({ app: "notes", page: "new" });
};
VERBS.save_note = () => {
  const title = value("note_title");
  if (!title) return (S.toast = "A note needs a title");
  S.notes = [{ title, body: value("note_body") }].concat(S.notes.filter((n) => n.title !== title));
  done("Note saved");
};
VERBS.note = (title) => go({ app: "notes", page: "note", title });
VERBS.drop_note = (title) => {
  S.notes = S.notes.filter((n) => n.title !== title);
  done("Note deleted");
};

/* ---- calendar */

const MONTHS = "January February March April May June July August September October November December".split(" ");
const monthName = (m) => `${MONTHS[(m - 1) % 12]} ${S.year + Math.floor((m - 1) / 12)}`;
APPS.calendar = {
  title: "Calendar",
  colour: "#e53935",
  icon: '<path d="M4 6h16v14H4zM4 10h16M8 3v5M16 3v5"/>',
  render(screen) {
    if (screen.page === "new") return bar(`${screen.day} ${monthName(screen.month)}`) + body(field("event_title", "Event title", "save_event") + button("save_event", "Save"));
    if (screen.page === "day") {
      const events = S.events.filter((e) => e.month === screen.month && e.day === screen.day);
      return bar(`${screen.day} ${monthName(screen.month)}`) + body(each(events, (e) => row("drop_event:" + e.title, e.title, "Tap the bin to delete", ICONS.trash)) || empty("No events")) + fab("new_event");
    }
    const month = screen.month || S.month;
    const first = (new Date(S.year, month - 1, 1).getDay() + 6) % 7;
    const days = new Date(S.year, month, 0).getDate();
    const cells = each([...Array(first).keys()], () => "<i></i>") + each([...Array(days).keys()], (i) => {
      const busy = S.events.some((e) => e.month === month && e.day === i + 1);
      return `<span class="${month === S.month && i + 1 === S.day ? "today" : ""} ${busy ? "busy" : ""}" data-a="day:${month}-${i + 1}">${i + 1}</span>`;
    });
    return bar("Calendar") + body(`<div class="month">${icon("month:" + (month - 1), "left", "previous")}<b>${monthName(month)}</b>${icon("month:" + (month + 1), "chevron", "next")}</div><div class="days"><b>M</b><b>T</b><b>W</b><b>T</b><b>F</b><b>S</b><b>S</b>${cells}</div>`);
  },
};
VERBS.month = (month) => {
  if (Number(month) >= 1) S.stack[S.stack.length - 1] = { app: "calendar", page: "main", month: Number(month) };
};
VERBS.day = (date) => {
  const [month, day] = date.split("-").map(Number);
  go({ app: "calendar", page: "day", month, day });
};
VERBS.new_event = () => {
  forget("event_title");
  go({ ...top_(), page: "new" });
};
VERBS.save_event = () => {
  const title = value("event_title");
  if (!title) return (S.toast = "An event needs a title");
  S.events.push({ month: top_().month, day: top_().day, title });
  done("Event saved");
};
VERBS.drop_event = (title) => {
  S.events = S.events.filter((e) => !(e.title === title && e.day === top_().day && e.month === top_().month));
};

/* ---- weather */

const sky = (kind) =>
  svg({ sunny: '<circle cx="12" cy="12" r="5" fill="#fdd835" stroke="none"/>', cloudy: '<path fill="#cfd8dc" stroke="none" d="M5 18a4 4 0 010-8 6 6 0 0111-1 4.5 4.5 0 012 9z"/>', rainy: '<path fill="#90a4ae" stroke="none" d="M5 14a4 4 0 010-7 6 6 0 0111-1 4 4 0 012 8z"/><path d="M8 17l-1 3M13 17l-1 3M18 17l-1 3"/>', snowy: '<path d="M12 4v16M5 8l14 8M19 8L5 16"/>' }[kind]);
APPS.weather = {
  title: "Weather",
  colour: "#29b6f6",
  icon: '<circle cx="9" cy="9" r="3.5"/><path d="M8 19a3.5 3.5 0 010-7 5 5 0 019 0 3.5 3.5 0 010 7z"/>',
  render(screen) {
    if (screen.page === "city") {
      const w = DATA.weather[screen.city];
      return bar(screen.city) + body(`<div class="now">${sky(w.kind)}<b>${w.degrees}°</b><span>${h(w.kind)}</span></div>${each(w.days, (d) => `<div class="row">${sky(d.kind)}<div class="grow t">${h(d.day)}</div><b>${d.high}° <span class="s">${d.low}°</span></b></div>`)}`, "sky");
    }
    if (screen.page === "add") {
      const found = Object.keys(DATA.weather).filter((c) => value("city") && c.toLowerCase().includes(value("city").toLowerCase()) && !S.cities.includes(c));
      return bar("Add a city") + body(field("city", "City name") + each(found, (c) => row("add_city:" + c, c, "Add", ICONS.plus)));
    }
    return bar("Weather") + body(each(S.cities, (c) => `<div class="city" data-a="city:${h(c)}"><div class="grow"><b>${h(c)}</b><p>${h(DATA.weather[c].kind)}</p></div>${sky(DATA.weather[c].kind)}<b>${DATA.weather[c].degrees}°</b></div>`)) + fab("new_city");
  },
};
VERBS.city = (city) => go({ app: "weather", page: "city", city });
VERBS.new_city = () => {
  forget("city");
  go({ app: "weather", page: "add" });
};
VERBS.add_city = (city) => {
  S.cities.push(city);
  done(city + " added");
};

/* ---- maps */

function chart(text) {
  const a = hue(text);
  const roads = each([...Array(5).keys()], (i) => `<path d="M0 ${30 + ((a + i * 53) % 180)}L360 ${20 + ((a * 3 + i * 61) % 200)}M${20 + ((a * 5 + i * 71) % 320)} 0L${20 + ((a * 7 + i * 97) % 320)} 240"/>`);
  return `<svg class="chart" viewBox="0 0 360 240" preserveAspectRatio="xMidYMid slice"><rect width="360" height="240" fill="#e8eee0"/><rect x="${a % 250}" y="${a % 120}" width="110" height="80" rx="12" fill="#c5e1a5"/><path d="M0 ${60 + (a % 120)}Q180 ${a % 200} 360 ${80 + (a % 90)}" stroke="#90caf9" stroke-width="22" fill="none"/><g stroke="#fff" stroke-width="7" fill="none">${roads}</g><circle cx="180" cy="120" r="9" fill="#e53935" stroke="#fff" stroke-width="3"/></svg>`;
}
APPS.maps = {
  title: "Maps",
  colour: "#43a047",
  icon: '<path d="M12 21c-4-6-6-8-6-11a6 6 0 0112 0c0 3-2 5-6 11z"/><circle cx="12" cy="10" r="2"/>',
  render(screen) {
    if (screen.page === "place") {
      const p = DATA.places.find((x) => x.name === screen.place);
      const saved = S.saved_places.includes(p.name);
      return bar(p.name) + body(chart(p.name) + `<div class="head"><h2>${h(p.name)}</h2><p>${h(p.kind)} · ${h(p.street)}</p></div>${button("directions:" + p.name, "Directions")}${button("save_place:" + p.name, saved ? "Saved" : "Save", "quiet")}`);
    }
    if (screen.page === "route")
      return bar("Directions") + body(chart(screen.place + "!") + `<div class="head"><h2>To ${h(screen.place)}</h2><p>${5 + (hue(screen.place) % 40)} min by car</p></div>${plain("Head north", "200 m")}${plain("Turn right", "1.2 km")}${plain("Arrive at " + screen.place, "")}`);
    if (screen.page === "results") {
      const found = DATA.places.filter((p) => (p.name + " " + p.kind).toLowerCase().includes(screen.q));
      return bar("Maps") + body(field("place", "Search here", "find") + (each(found, (p) => row("place:" + p.name, p.name, p.kind + " · " + p.street, "", ICONS.pin)) || empty("Nothing found for " + screen.q)));
    }
    return bar("Maps") + body(field("place", "Search here", "find") + chart("town") + `<h3>Saved places</h3>` + (each(S.saved_places, (name) => row("place:" + name, name, "Saved", "", ICONS.pin)) || empty("None yet")));
  },
};
VERBS.find = () => {
  const q = value("place").toLowerCase();
  if (!q) return (S.toast = "Type what to look for");
  go({ app: "maps", page: "results", q });
};
VERBS.place = (place) => go({ app: "maps", page: "place", place });
VERBS.directions = (place) => go({ app: "maps", page: "route", place });
VERBS.save_place = (place) => {
  if (!S.saved_places.includes(place)) S.saved_places.push(place);
  S.toast = "Saved";
};
