"""Word tables that the bundled tasks draw from.

Words are short and few on purpose: a byte-level BPE vocabulary of 1,115 tokens then
holds every word as one token, and a model of a million parameters can learn every table.
"""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ANIMALS = _words("cat dog fox hen cow pig owl bee ant bat rat wolf bear deer goat duck")
FOODS = _words("pear plum fig lime rice corn bean cake soup bread milk egg ham nut pie jam")
TOOLS = _words("saw axe nail rope hook drill lamp pen cup pot fork knife spoon broom key pin")
NOUNS = ANIMALS + FOODS + TOOLS
CATEGORIES = {"animals": ANIMALS, "foods": FOODS, "tools": TOOLS}

NAMES = _words("Anna Ben Carl Dora Emma Finn Gina Hugo Ida Jack Kate Leo Mary Nick Olga Paul")
CITIES = _words("Rome Paris Oslo Cairo Lima Delhi Tokyo Berlin Madrid Quito Dublin Seoul")
JOBS = _words("baker farmer nurse pilot cook singer driver doctor writer judge clerk guard")

OPPOSITES = {
    "hot": "cold", "big": "small", "fast": "slow", "old": "new", "wet": "dry", "high": "low",
    "full": "empty", "hard": "soft", "dark": "light", "rich": "poor", "loud": "quiet",
    "good": "bad", "long": "short", "open": "closed", "happy": "sad", "clean": "dirty",
}  # fmt: skip

# Irregular verbs only: ROUGE stems words, so "walks" and "walked" would count as one word.
PAST_TENSE = {
    "eats": "ate", "finds": "found", "buys": "bought", "hears": "heard", "takes": "took",
    "gives": "gave", "brings": "brought", "keeps": "kept", "sells": "sold", "holds": "held",
    "loses": "lost", "hides": "hid", "makes": "made", "leaves": "left", "draws": "drew",
    "wins": "won",
}  # fmt: skip

COLOURS = {
    "grass": "green", "leaf": "green", "frog": "green", "snow": "white", "salt": "white",
    "swan": "white", "coal": "black", "ink": "black", "crow": "black", "sun": "yellow",
    "lemon": "yellow", "gold": "yellow", "blood": "red", "rose": "red", "ruby": "red",
    "sky": "blue", "sea": "blue", "jeans": "blue",
}  # fmt: skip

NUMBER_WORDS = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}
