"""`--quick` (`make check`): of each test function as few cases as together have every value of every parameter.

Cases are left out, tests are not, but for those marked `slow`; hypothesis draws a tenth of its examples.
"""

from hypothesis import settings

settings.register_profile("quick", max_examples=settings.get_profile("default").max_examples // 10)


def examples(count):
    """Return how many examples of `count` hypothesis is to draw: all of them, or a tenth in a quick run."""
    return max(1, count * settings().max_examples // settings.get_profile("default").max_examples)


def parameters(item):
    return item.callspec.params if hasattr(item, "callspec") else {}


def values(item):
    """Return what a case has of its function's parameters: (name, which value) for each."""
    told_apart = (str, bytes, int, float, complex, tuple, type(None))  # equal ones may be several objects
    return {
        (name, repr(value) if isinstance(value, told_apart) else id(value)) for name, value in parameters(item).items()
    }


def cover(items):
    """Return cases of one function in which every value of every parameter occurs.

    Each adds as many values as any other could; where several do, not one that is interpreted, which takes longest.
    """
    cases = [(item, values(item), parameters(item).get("engine_name") != "cuda") for item in items]
    missing = set().union(*(found for _, found, _ in cases))
    chosen = [] if missing else items[:1]
    while missing:
        item, found, _ = max(cases, key=lambda case: (len(case[1] & missing), case[2]))
        chosen.append(item)
        missing -= found
    return chosen


def select(items):
    """Return the items of a quick run, in their order."""
    functions = {}
    for item in items:
        if not item.get_closest_marker("slow"):
            functions.setdefault(item.nodeid.split("[")[0], []).append(item)
    chosen = {item for cases in functions.values() for item in cover(cases)}
    return [item for item in items if item in chosen]
