"""The `general` task set for the embedded phone: everyday tasks in its apps, made from templates.

Train and test tasks share templates but no items: no name, text, time, place or setting occurs in the instructions of
both halves.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Literal

from envs.android.phone import content
from envs.android.tasks import Check, Conditions, Edit, Step, Task, screen

Split = Literal["train", "test"]

_APP_NAMES = {app: app.capitalize() for app in content.APPS}
_NEW_NAMES = [
    "Amir Said",
    "Bella Fox",
    "Carl Moss",
    "Dora Lind",
    "Emil Kranz",
    "Fiona Reed",
    "Gita Rao",
    "Henk Visser",
    "Ivy Stone",
    "Jan Novy",
    "Kim Soto",
    "Lola Marin",
    "Mika Aho",
    "Nora Blum",
    "Otto Kern",
]
_TEXTS = [
    "See you at noon",
    "I am running late",
    "Happy birthday",
    "Please call me",
    "Dinner at eight",
    "Thank you",
    "The train is on time",
    "Buy some milk",
    "Good luck today",
    "Where are you",
    "Meeting moved to Friday",
    "I am home",
    "Bring the keys",
    "Nice photo",
    "Sleep well",
]
_TITLES = [
    "Ideas",
    "Passwords hint",
    "Paint colours",
    "Vet visit",
    "Homework",
    "Bike repair",
    "Tax papers",
    "Menu",
    "Goals",
    "Chores",
    "Guest list",
    "Plants",
]
_EVENTS = [
    "Haircut",
    "Job interview",
    "Swim class",
    "Board meeting",
    "Picnic",
    "Flight to Rome",
    "Optician",
    "Choir",
    "School fair",
    "Tax deadline",
    "Theatre",
    "Vaccination",
]
_MINUTES = (1, 2, 3, 5, 7, 10, 15, 20, 25, 30, 45, 60)


@cache
def general_tasks(split: Split) -> tuple[Task, ...]:
    """The tasks of one half, in a fixed order that mixes the templates."""

    def part(items: Sequence, test_share: float = 1 / 3) -> list:
        """This half's items: about every third one is for testing."""
        every = round(1 / test_share)
        return [item for index, item in enumerate(items) if (index % every == every - 1) == (split == "test")]

    groups: list[Iterable[Task]] = [
        (_open_app(app) for app in part(content.APPS)),
        (_toggle(page, key, on) for page, key in part(_toggles()) for on in (True, False)),
        (_choose(key, value) for key, value in part(_choices())),
        (_new_alarm(time) for time in part([f"{h:02d}:{m:02d}" for h in range(5, 23, 3) for m in (5, 20, 40, 50)])),
        (_switch_alarm(time, on) for time in part(_alarm_times(10)) for on in (True, False)),
        (_delete_alarm(time) for time in part(_alarm_times(35))),
        (_timer(minutes) for minutes in part(_MINUTES)),
        (_new_contact(name, index) for index, name in part(list(enumerate(_NEW_NAMES)))),
        (_delete_contact(name) for name in part(content.CONTACTS[:9])),
        (_call(name) for name in part(content.CONTACTS[9:18])),
        (_star(name) for name in part(content.CONTACTS[18:])),
        (_message(text, content.CONTACTS[index]) for index, text in part(list(enumerate(_TEXTS)))),
        (_new_note(title) for title in part(_TITLES)),
        (_delete_note(title) for title in part(content.NOTES)),
        (_event(title, 2 + 2 * index) for index, title in part(list(enumerate(_EVENTS)))),
        (_show_weather(city) for city in part(content.CITIES[:15])),
        (_add_city(city) for city in part(content.CITIES[15:30])),
        (_find_place(place) for place in part(content.PLACES[:15])),
        (_directions(place) for place in part(content.PLACES[15:30])),
    ]
    return mixed(groups)


def mixed(groups: Iterable[Iterable[Task]]) -> tuple[Task, ...]:
    """Interleave the groups, so that any prefix of the tasks contains tasks of every group."""
    left = [list(group) for group in groups]
    tasks = []
    while any(left):
        for group in left:
            if group:
                tasks.append(group.pop(0))
    return tuple(tasks)


def _toggles() -> list[tuple[str, str]]:
    return [(page, key) for page, keys in content.TOGGLES.items() for key in keys]


def _choices() -> list[tuple[str, str]]:
    usual = {"Default", "30 seconds", "Aurora", "English"}
    return [(key, value) for key, (_, values) in content.CHOICES.items() for value in values if value not in usual]


def _alarm_times(minute: int) -> list[str]:
    return [f"{hour:02d}:{minute}" for hour in range(4, 22, 3)]


def _open(app: str) -> Step:
    return Step(f"open:{app}", (screen(app),))


def _variant(index: int, *phrases: str) -> str:
    return phrases[index % len(phrases)]


def _open_app(app: str) -> Task:
    return Task(f"open_app/{app}", f"Open the {_APP_NAMES[app]} app", screen(app), (), (_open(app),))


def _toggle(page: str, key: str, on: bool) -> Task:
    name, word = content.TOGGLES[page][key], "on" if on else "off"
    return Task(
        f"toggle/{key}_{word}",
        _variant(len(key), f"Turn {word} {name}", f"Switch {name} {word}", f"Go to settings and turn {word} {name}"),
        (Check(f"settings.{key}", "equals", on),),
        (Edit("set", f"settings.{key}", not on),),
        (_open("settings"), Step(f"page:{page}", (screen("settings", page),)), Step(f"toggle:{key}")),
    )


def _choose(key: str, value: str) -> Task:
    page = content.CHOICES[key][0]
    name = {"timeout": "screen timeout"}.get(key, key.replace("_", " "))
    return Task(
        f"choose/{key}_{value}",
        _variant(len(value), f"Set the {name} to {value}", f"Change the {name} to {value}"),
        (Check(f"settings.{key}", "equals", value),),
        (),
        (
            _open("settings"),
            Step(f"page:{page}", (screen("settings", page, key),)),
            Step(f"page:{key}", (screen("settings", key),)),
            Step(f"choose:{key}={value}"),
        ),
    )


def _form(app: str, opener: str, fields: dict[str, str], save: str, page: Conditions) -> tuple[Step, ...]:
    """The steps to open an app's form with a button, fill it in and save it."""
    typed = tuple(
        Step(name, ((*page, Check(f"fields.{name}", "equals", text)),), text) for name, text in fields.items()
    )
    return (_open(app), Step(opener, (page,)), *typed, Step(save))


def _new_alarm(time: str) -> Task:
    return Task(
        f"new_alarm/{time}",
        _variant(int(time[:2]) // 3, f"Set an alarm for {time}", f"Wake me up at {time}", f"Add an alarm at {time}"),
        (Check("alarms", "has", {"time": time, "on": True}),),
        (Edit("drop", "alarms", {"time": time}),),
        _form("clock", "new_alarm", {"alarm_time": time}, "save_alarm", screen("clock", "new")),
    )


def _switch_alarm(time: str, on: bool) -> Task:
    word = "on" if on else "off"
    return Task(
        f"switch_alarm/{time}_{word}",
        f"Turn {word} the {time} alarm",
        (Check("alarms", "has", {"time": time, "on": on}),),
        (Edit("put", "alarms", {"time": time, "label": "", "on": not on}),),
        (_open("clock"), Step("tab:main", (screen("clock", "main"),)), Step(f"alarm:{time}")),
    )


def _delete_alarm(time: str) -> Task:
    return Task(
        f"delete_alarm/{time}",
        f"Delete the alarm at {time}",
        (Check("alarms", "lacks", {"time": time}),),
        (Edit("put", "alarms", {"time": time, "label": "", "on": True}),),
        (_open("clock"), Step("tab:main", (screen("clock", "main"),)), Step(f"drop_alarm:{time}")),
    )


def _timer(minutes: int) -> Task:
    unit = "minute" if minutes == 1 else "minutes"
    return Task(
        f"timer/{minutes}",
        _variant(minutes, f"Start a timer for {minutes} {unit}", f"Set a {minutes} minute timer"),
        (Check("timer", "equals", {"minutes": minutes}),),
        (),
        (_open("clock"), Step("tab:timer", (screen("clock", "timer"),)), Step(f"timer:{minutes}")),
    )


def _new_contact(name: str, index: int) -> Task:
    number = f"555-02{index:02d}"
    return Task(
        f"new_contact/{name}",
        _variant(index, f"Add {name} to the contacts with number {number}", f"Save the number {number} as {name}"),
        (Check("contacts", "has", {"name": name, "phone": number}),),
        (Edit("drop", "contacts", {"name": name}),),
        _form(
            "contacts",
            "new_contact",
            {"contact_name": name, "contact_phone": number},
            "save_contact",
            screen("contacts", "new"),
        ),
    )


def _with_contact(name: str, star: bool = False) -> tuple[Edit, ...]:
    return (
        Edit("drop", "contacts", {"name": name}),
        Edit("put", "contacts", {"name": name, "phone": "555-0300", "star": star}),
    )


def _person(name: str) -> tuple[Step, ...]:
    return (_open("contacts"), Step(f"contact:{name}", (screen("contacts", "person", name=name),)))


def _delete_contact(name: str) -> Task:
    return Task(
        f"delete_contact/{name}",
        f"Delete the contact {name}",
        (Check("contacts", "lacks", {"name": name}),),
        _with_contact(name),
        (*_person(name), Step(f"drop_contact:{name}")),
    )


def _call(name: str) -> Task:
    return Task(
        f"call/{name}",
        _variant(len(name), f"Call {name}", f"Phone {name}"),
        (Check("calls", "has", name),),
        _with_contact(name),
        (*_person(name), Step(f"call:{name}")),
    )


def _star(name: str) -> Task:
    return Task(
        f"star/{name}",
        f"Mark {name} as a favourite contact",
        (Check("contacts", "has", {"name": name, "star": True}),),
        _with_contact(name),
        (*_person(name), Step(f"star_contact:{name}")),
    )


def _message(text: str, name: str) -> Task:
    thread = screen("messages", "thread", name=name)
    return Task(
        f"message/{text}",
        _variant(len(text), f'Send "{text}" to {name}', f'Message {name}: "{text}"'),
        (Check("threads", "has", {"name": name, "messages": [{"me": True, "text": text}]}),),
        (*_with_contact(name), Edit("drop", "threads", {"name": name})),
        (
            _open("messages"),
            Step("page:new", (screen("messages", "new"), thread)),
            Step(f"thread:{name}", (thread,)),
            Step("message", ((*thread, Check("fields.message", "equals", text)),), text),
            Step(f"send:{name}"),
        ),
    )


def _new_note(title: str) -> Task:
    return Task(
        f"new_note/{title}",
        _variant(len(title), f'Create a note called "{title}"', f'Make a new note with the title "{title}"'),
        (Check("notes", "has", {"title": title}),),
        (Edit("drop", "notes", {"title": title}),),
        _form("notes", "new_note", {"note_title": title}, "save_note", screen("notes", "new")),
    )


def _delete_note(title: str) -> Task:
    return Task(
        f"delete_note/{title}",
        f'Delete the note "{title}"',
        (Check("notes", "lacks", {"title": title}),),
        (Edit("drop", "notes", {"title": title}), Edit("put", "notes", {"title": title, "body": "Old"})),
        (_open("notes"), Step(f"note:{title}", (screen("notes", "note", title=title),)), Step(f"drop_note:{title}")),
    )


def _event(title: str, day: int) -> Task:
    date = {"month": content.MONTH, "day": day}
    on_day = screen("calendar", "day", **date)
    form = screen("calendar", "new", **date)
    return Task(
        f"event/{title}",
        f'Add "{title}" to the calendar on {day} November',
        (Check("events", "has", {**date, "title": title}),),
        (),
        (
            _open("calendar"),
            Step(f"day:{content.MONTH}-{day}", (on_day, form)),
            Step("new_event", (form,)),
            Step("event_title", ((*form, Check("fields.event_title", "equals", title)),), title),
            Step("save_event"),
        ),
    )


def _show_weather(city: str) -> Task:
    return Task(
        f"weather/{city}",
        _variant(len(city), f"What is the weather in {city}?", f"Show the forecast for {city}"),
        screen("weather", "city", city=city),
        (Edit("put", "cities", city),),
        (_open("weather"), Step(f"city:{city}")),
    )


def _add_city(city: str) -> Task:
    form = screen("weather", "add")
    return Task(
        f"add_city/{city}",
        f"Add {city} to the weather app",
        (Check("cities", "has", city),),
        (Edit("drop", "cities", city),),
        (
            _open("weather"),
            Step("new_city", (form,)),
            Step("city", ((*form, Check("fields.city", "equals", city)),), city),
            Step(f"add_city:{city}"),
        ),
    )


def _search_place(place: str) -> tuple[Step, ...]:
    found = screen("maps", "results", q=place.lower())
    on_map = screen("maps", "place", place=place)
    return (_open("maps"), Step("place", (found, on_map), place, submit=True), Step(f"place:{place}", (on_map,)))


def _find_place(place: str) -> Task:
    return Task(
        f"find_place/{place}",
        _variant(len(place), f"Show {place} on the map", f"Find {place} in Maps"),
        screen("maps", "place", place=place),
        (Edit("drop", "saved_places", place),),
        _search_place(place),
    )


def _directions(place: str) -> Task:
    return Task(
        f"directions/{place}",
        _variant(len(place), f"Get directions to {place}", f"Navigate to {place}"),
        screen("maps", "route", place=place),
        (Edit("drop", "saved_places", place),),
        (*_search_place(place), Step(f"directions:{place}")),
    )
