"""The `webshop` task set for the embedded phone: two web shops, with three depths as in AitW's Web Shopping.

Depth 1: go to a site or one of its departments; depth 2: search there; depth 3: open the first result. Train and test
tasks share the sites but no departments and no goods.
"""

from __future__ import annotations

from functools import cache

from envs.android.general_tasks import Split, mixed
from envs.android.phone import content
from envs.android.tasks import Check, Step, Task, screen

_SEARCH_FIELDS = {"amberly": "amberly_q", "voltmart": "voltmart_q"}


@cache
def webshop_tasks(split: Split) -> tuple[Task, ...]:
    """The tasks of one half, in a fixed order that mixes the depths."""
    departments, queries = _items(split)
    return mixed(
        [
            (_site(shop) for shop in content.SITES if (shop == "amberly") == (split == "train")),
            (_department(shop, department) for shop, department in departments),
            (_search(shop, query) for shop, query in queries),
            (_first_result(shop, query) for shop, query in queries),
        ]
    )


def _items(split: Split) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(shop, department) and (shop, query) of one half: every third department, with all its goods, is for testing."""
    departments = [
        (shop, department)
        for shop, goods in content.GOODS.items()
        for index, department in enumerate(goods)
        if (index % 3 == 2) == (split == "test")
    ]
    adjectives = ("", "premium ", "eco ") if split == "test" else ("", "classic ")
    queries = [
        (shop, query)
        for shop, department in departments
        for kind in content.GOODS[shop][department]
        for adjective in adjectives
        if content.search(shop, query := adjective + kind)
    ]
    return departments, queries


def _go(shop: str) -> tuple[Step, ...]:
    """The steps to open the browser and type the site's address."""
    there = (Check("screen.site", "equals", shop),)
    return (
        Step("open:browser", (screen("browser"),)),
        Step("url", (there,), content.SITES[shop], submit=True),
    )


def _site(shop: str) -> Task:
    return Task(f"site/{shop}", f"Go to {content.SITES[shop]}", screen("browser", "main", site=shop), (), _go(shop))


def _department(shop: str, department: str) -> Task:
    menu = (Step("shop_page:menu", (screen("browser", "menu", site=shop),)),) if shop == "voltmart" else ()
    # Amberly lists its departments only on its front page.
    front = (Step("visit_site:amberly", (screen("browser", "main", site=shop),)),) if shop == "amberly" else ()
    return Task(
        f"department/{shop}/{department}",
        f"Go to {content.SITES[shop]} and open the {department} department",
        screen("browser", "department", site=shop, department=department),
        (),
        (*_go(shop), *menu, *front, Step(f"department:{department}")),
    )


def _search_steps(shop: str, query: str, *beyond: str) -> tuple[Step, ...]:
    """The steps to search a site; also done on a page reached from the results of the same query."""
    done = screen("browser", "results", *beyond, site=shop, q=query)
    form = (Step("shop_page:find", (screen("browser", "find", site=shop), done)),) if shop == "voltmart" else ()
    return (*_go(shop), *form, Step(_SEARCH_FIELDS[shop], (done,), query, submit=True))


def _search(shop: str, query: str) -> Task:
    return Task(
        f"search/{shop}/{query}",
        f"Go to {content.SITES[shop]} and search for {query}",
        screen("browser", "results", site=shop, q=query),
        (),
        _search_steps(shop, query),
    )


def _first_result(shop: str, query: str) -> Task:
    first = content.search(shop, query)[0]["id"]
    return Task(
        f"first_result/{shop}/{query}",
        f"Go to {content.SITES[shop]}, search for {query} and open the first result",
        screen("browser", "product", site=shop, product=first, q=query),
        (),
        (*_search_steps(shop, query), Step(f"product:{first}={query}")),
    )
