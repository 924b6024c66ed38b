"""The content of the embedded phone: catalogues, the same for every phone, and the initial state of a seed."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

State = dict[str, Any]
"""The phone's whole state as JSON: settings, the content of every app, and the stack of screens."""

APPS = ("browser", "settings", "clock", "contacts", "messages", "notes", "calendar", "weather", "maps")
#: All pages of the launcher and the apps.
PAGES = [
    "home",
    "main",
    "network",
    "display",
    "sound",
    "battery",
    "privacy",
    "system",
    "about",
    "font_size",
    "timeout",
    "ringtone",
    "language",
    "new",
    "timer",
    "person",
    "call",
    "thread",
    "note",
    "day",
    "city",
    "add",
    "results",
    "place",
    "route",
    "lost",
    "menu",
    "find",
    "department",
    "product",
    "cart",
]
YEAR, MONTH, DAY = 2026, 11, 24

SITES = {"amberly": "amberly.com", "voltmart": "voltmart.com"}
#: Shop -> department -> kinds of goods. The shops share no kind.
GOODS: dict[str, dict[str, tuple[str, ...]]] = {
    "amberly": {
        "Kitchen": ("coffee mug", "bread knife", "frying pan", "tea kettle"),
        "Garden": ("watering can", "garden hose", "plant pot", "bird feeder"),
        "Books": ("cook book", "travel guide", "puzzle book", "sketch book"),
        "Toys": ("wooden train", "board game", "toy robot", "jigsaw puzzle"),
        "Sports": ("yoga mat", "tennis racket", "water bottle", "running belt"),
        "Clothing": ("rain jacket", "wool socks", "straw hat", "denim shirt"),
        "Beauty": ("hand cream", "hair brush", "bath salt", "lip balm"),
        "Pets": ("dog leash", "cat tree", "fish tank", "pet bed"),
    },
    "voltmart": {
        "Audio": ("headphones", "bluetooth speaker", "microphone", "record player"),
        "Computers": ("laptop", "desktop monitor", "keyboard", "laser mouse"),
        "Phones": ("phone case", "charging cable", "power bank", "screen protector"),
        "Cameras": ("action camera", "camera tripod", "memory card", "lens filter"),
        "Gaming": ("game controller", "gaming chair", "racing wheel", "arcade stick"),
        "Smart home": ("light bulb", "door sensor", "smart plug", "robot vacuum"),
        "Networking": ("wifi router", "network switch", "usb hub", "mesh extender"),
        "Appliances": ("microwave oven", "desk fan", "air purifier", "electric shaver"),
    },
}
_ADJECTIVES = ("Classic", "Premium", "Compact", "Eco", "Deluxe", "Travel")
CITIES = [
    "Amsterdam",
    "Athens",
    "Bergen",
    "Berlin",
    "Bogota",
    "Cairo",
    "Chicago",
    "Dakar",
    "Delhi",
    "Dublin",
    "Geneva",
    "Hanoi",
    "Helsinki",
    "Istanbul",
    "Jakarta",
    "Kyoto",
    "Lagos",
    "Lima",
    "Lisbon",
    "London",
    "Madrid",
    "Manila",
    "Mumbai",
    "Nairobi",
    "Naples",
    "Osaka",
    "Oslo",
    "Paris",
    "Prague",
    "Quito",
    "Reykjavik",
    "Riga",
    "Rome",
    "Seoul",
    "Sydney",
    "Tallinn",
    "Tokyo",
    "Toronto",
    "Vienna",
    "Zurich",
]
_SKIES = ("sunny", "cloudy", "rainy", "snowy")
_PLACE_KINDS = ("Museum", "Cafe", "Library", "Park", "Hotel", "Pharmacy", "Station", "Bakery")
_PLACE_NAMES = ("Harbour", "Linden", "Castle", "Mill", "Sunset", "Orchard")
_STREETS = ("High Street", "Canal Road", "Station Avenue", "Market Square", "Hill Lane")
PLACES = tuple(f"{name} {kind}" for kind in _PLACE_KINDS for name in _PLACE_NAMES)
CONTACTS = [
    "Ada Novak",
    "Ben Okoro",
    "Clara Diaz",
    "David Kim",
    "Elena Rossi",
    "Farid Aziz",
    "Grace Lee",
    "Hugo Martin",
    "Ines Silva",
    "Jonas Berg",
    "Karin Lund",
    "Leo Fischer",
    "Maya Patel",
    "Nils Strand",
    "Olga Petrova",
    "Pedro Alves",
    "Quinn Walsh",
    "Rosa Blanco",
    "Sami Haddad",
    "Tara Singh",
    "Umar Khan",
    "Vera Horn",
    "Wendy Chu",
    "Yusuf Demir",
]
NOTES = [
    "Groceries",
    "Gift ideas",
    "Book list",
    "Packing list",
    "Recipes",
    "Garden plan",
    "Workout",
    "Meeting notes",
    "Movie list",
    "Car service",
    "Birthday plan",
    "House repairs",
    "Quotes",
    "Trip budget",
    "Songs to learn",
    "Wish list",
]
_NOTE_BODIES = ("Ask Tara first", "Due on Friday", "See the blue folder", "Three things left", "Call back on Monday")
EVENTS = ["Dentist", "Team lunch", "Yoga class", "Parent evening", "Book club", "Car wash", "Concert", "Piano lesson"]
GREETINGS = ("Are you there?", "See you soon", "Thanks for yesterday", "On my way", "Call me later", "Good morning!")
TOGGLES = {
    "network": {
        "wifi": "Wi-Fi",
        "bluetooth": "Bluetooth",
        "mobile_data": "mobile data",
        "airplane_mode": "airplane mode",
        "hotspot": "the hotspot",
    },
    "display": {
        "dark_mode": "the dark theme",
        "auto_rotate": "auto-rotate",
        "adaptive_brightness": "adaptive brightness",
    },
    "sound": {"do_not_disturb": "do not disturb", "vibrate": "vibrate for calls", "touch_sounds": "touch sounds"},
    "battery": {"battery_saver": "the battery saver", "battery_percentage": "the battery percentage"},
    "privacy": {"location": "location", "camera_access": "camera access", "microphone_access": "microphone access"},
}
CHOICES = {
    "font_size": ("display", ("Small", "Default", "Large", "Very large")),
    "timeout": ("display", ("15 seconds", "30 seconds", "1 minute", "5 minutes", "10 minutes")),
    "ringtone": ("sound", ("Aurora", "Bell", "Chime", "Drift", "Echo", "Marimba")),
    "language": ("system", ("English", "Deutsch", "Español", "Français", "Italiano", "Português")),
}
_USUALLY_ON = {"wifi", "mobile_data", "auto_rotate", "vibrate", "location", "camera_access", "microphone_access"}


@cache
def products(shop: str) -> list[dict[str, Any]]:
    """A shop's goods in the order of its search results: id, name, department, price in cents, stars (1..5)."""
    rng = np.random.default_rng(sorted(SITES).index(shop))
    return [
        {
            "id": f"{shop[0]}{index:03d}",
            "name": f"{adjective} {kind}",
            "department": department,
            "cents": int(rng.integers(5, 300)) * 100 - 1,
            "stars": int(rng.integers(2, 6)),
        }
        for index, (department, kind, adjective) in enumerate(
            (department, kind, adjective)
            for department, kinds in GOODS[shop].items()
            for kind in kinds
            for adjective in rng.permutation(_ADJECTIVES)[:3]
        )
    ]


def search(shop: str, query: str) -> list[dict[str, Any]]:
    """A shop's search results, in order: goods whose name and department together contain every word of the query."""
    words = query.lower().split()
    return [each for each in products(shop) if all(w in f"{each['name']} {each['department']}".lower() for w in words)]


def page_data() -> dict[str, Any]:
    """The catalogues in the page."""
    rng = np.random.default_rng(7)

    def day(name: str) -> dict[str, Any]:
        low = int(rng.integers(-5, 22))
        high = low + int(rng.integers(3, 11))
        return {"day": name, "kind": _SKIES[int(rng.integers(3 if high > 3 else 4))], "low": low, "high": high}

    def forecast() -> dict[str, Any]:
        days = [day(name) for name in ("Today", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")]
        return {"degrees": days[0]["high"], "kind": days[0]["kind"], "days": days}

    return {
        "shops": {shop: {"departments": list(GOODS[shop]), "products": products(shop)} for shop in SITES},
        "weather": {city: forecast() for city in CITIES},
        "places": [
            {"name": place, "kind": place.split()[1], "street": f"{index * 7 % 90 + 1} {_STREETS[index % 5]}"}
            for index, place in enumerate(PLACES)
        ],
    }


def initial_state(seed: int, shuffle_apps: bool = False) -> State:
    """The initial state of a seed, at the launcher. `shuffle_apps`: order the launcher's icons by the seed."""
    rng = np.random.default_rng([seed, 11])

    def some(items: Any, count: int) -> list[str]:
        return [str(item) for item in rng.choice(list(items), size=count, replace=False)]

    layout = [str(app) for app in rng.permutation(APPS)] if shuffle_apps else list(APPS)
    names = sorted(some(CONTACTS, 6))
    settings: dict[str, Any] = {
        key: key in _USUALLY_ON if rng.random() < 0.85 else key not in _USUALLY_ON
        for keys in TOGGLES.values()
        for key in keys
    }
    # These change the look of everything, so they start switched off.
    settings |= {"dark_mode": False, "airplane_mode": False}
    settings |= {"font_size": "Default", "timeout": "30 seconds", "ringtone": "Aurora", "language": "English"}
    hour, minute = int(rng.integers(7, 22)), int(rng.integers(60))
    return {
        "time": f"{hour:02d}:{minute:02d}",
        "date_text": "Tuesday, 24 November",
        "year": YEAR,
        "month": MONTH,
        "day": DAY,
        "wallpaper": int(rng.integers(360)),
        "layout": layout,
        "settings": settings,
        "alarms": [
            {"time": time, "label": label, "on": bool(rng.random() < 0.5)}
            for time, label in (("06:15", "Gym"), ("07:00", "Work"), ("09:30", "Weekend"))
        ],
        "timer": None,
        "contacts": [
            {"name": name, "phone": f"555-01{int(rng.integers(100)):02d}", "star": bool(rng.random() < 0.2)}
            for name in names
        ],
        "calls": [],
        "threads": [
            {"name": name, "messages": [{"me": False, "text": str(rng.choice(GREETINGS))}]} for name in some(names, 3)
        ],
        "notes": [{"title": title, "body": str(rng.choice(_NOTE_BODIES))} for title in some(NOTES, 4)],
        "events": [{"month": MONTH, "day": int(rng.integers(1, 31)), "title": title} for title in some(EVENTS, 3)],
        "cities": some(CITIES, 3),
        "saved_places": some(PLACES, 2),
        "carts": {shop: [] for shop in SITES},
        "stack": [{"app": "launcher", "page": "home"}],
        "fields": {},
        "focus": None,
        "toast": "",
    }
