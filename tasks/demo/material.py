"""The demo's invented world: who lives at the Crooked Kettle and what they quarrel about."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Character:
    """A lodger with a voice: `markers` are words that only this character uses, lower case."""

    name: str
    role: str
    markers: tuple[str, ...]
    lines: tuple[str, ...]
    closers: tuple[str, ...]


@dataclass(frozen=True)
class Topic:
    """A thing to talk about. Every trouble and remedy holds one of the topic's `keywords`."""

    name: str
    thing: str
    parts: tuple[str, ...]
    troubles: tuple[str, ...]
    remedies: tuple[str, ...]

    @property
    def keywords(self) -> frozenset[str]:
        return frozenset(phrase.split()[-1] for phrase in (self.thing, *self.parts))


CLOSING_PHRASES = ("that settles it", "good night", "enough")

CHARACTERS = (
    Character(
        name="BARNABY",
        role="an old ferry captain",
        markers=("aye", "crew", "tide", "tides", "anchor", "ferry", "starboard", "hull", "deck", "sea", "hoist"),
        lines=(
            "Aye, {thing} and me, we go back forty tides.",
            "Steady, crew. {Trouble}, and I have seen worse at sea.",
            "Drop anchor by {part} and {remedy}.",
            "On my old ferry we would {remedy} before breakfast.",
            "By the tides, {trouble}! All hands on deck.",
            "Mind {part}, crew, and lean to starboard.",
            "I crossed the bay by ferry with {part} in my coat.",
            "Hoist {thing} a little and listen to the hull.",
        ),
        closers=(
            "Aye, that settles it. To your bunks, crew.",
            "Good night, crew. I shall watch the tide.",
            "Enough. We drop anchor here.",
        ),
    ),
    Character(
        name="ODETTE",
        role="a retired soprano",
        markers=("darling", "darlings", "aria", "arias", "encore", "curtain", "spotlight", "diva", "divine"),
        lines=(
            "Darling, {thing} is a tragedy in three acts.",
            "I wept, darlings. {Trouble}, and nobody applauded.",
            "Bring me {part} and a spotlight.",
            "In Vienna we would {remedy} between two arias.",
            "{Trouble}? Divine. I shall sing about it.",
            "Never {remedy} without an encore, darling.",
            "Oh, {part}! I feel an aria coming on.",
            "The curtain rises, and there stands {thing}.",
        ),
        closers=(
            "That settles it, darlings. Curtain.",
            "Good night, darlings. Throw roses.",
            "Enough. The diva has spoken.",
        ),
    ),
    Character(
        name="FENWICK",
        role="a careful bookkeeper",
        markers=("item", "ledger", "strictly", "receipt", "per", "losses", "sum", "columns", "overdue", "ninepence"),
        lines=(
            "Item one: {trouble}. Item two: who pays?",
            "According to my ledger, {thing} cost us ninepence.",
            "Strictly speaking, nobody budgeted for {part}.",
            "I have a receipt for {part}, in duplicate.",
            "We could {remedy} and save eleven per cent.",
            "{Trouble}. I have entered it under losses.",
            "If we {remedy}, I shall need a receipt.",
            "The sum is clear: {thing} is overdue.",
        ),
        closers=(
            "That settles it. I am closing the ledger.",
            "Good night. Please keep the receipt.",
            "Enough. The columns agree at last.",
        ),
    ),
    Character(
        name="PIPPA",
        role="a young inventor",
        markers=("ooh", "springs", "cogs", "goggles", "prototype", "gadget", "rubber", "bang", "version", "workshop"),
        lines=(
            "Ooh, what if we put springs on {part}?",
            "I built a gadget for that! It can almost {remedy}.",
            "Ooh, {trouble}! Hand me the goggles.",
            "{Thing}, version nine! Now with more cogs.",
            "What if we {remedy}, but with rubber bands?",
            "My prototype ate {part}. Is that bad?",
            "One tiny bang and then we {remedy}, promise!",
            "{Trouble}, so I oiled the cogs and ran.",
        ),
        closers=(
            "Ooh, that settles it! To the workshop!",
            "Good night! Do not touch the springs!",
            "Enough talk, the prototype is smoking!",
        ),
    ),
    Character(
        name="GRUM",
        role="a gloomy gardener",
        markers=("hm", "mud", "turnips", "compost", "slugs", "worms", "frost", "rains", "rain", "weeds"),
        lines=(
            "Hm. {Thing}. It will end in mud.",
            "Hm. {Trouble}. So did my turnips.",
            "Bury {part} under the compost, I say.",
            "We could {remedy}. Then it rains.",
            "{Trouble}, and still the slugs come.",
            "Hm. I showed {part} to the worms. They left.",
            "My turnips never asked for {thing}.",
            "First {remedy}. Then frost. Always frost.",
        ),
        closers=(
            "Hm. That settles it. Back to the mud.",
            "Good night. Mind the slugs.",
            "Enough. The compost is getting cold.",
        ),
    ),
    Character(
        name="MIRELLE",
        role="a fortune teller",
        markers=("cards", "foresee", "spirits", "moon", "omen", "veil", "midnight", "candle", "prophecy", "stars"),
        lines=(
            "The cards showed me {thing}, upside down.",
            "I foresee it: {trouble} until the new moon.",
            "The spirits whisper about {part}.",
            "{Trouble}. The cards warned me on Tuesday.",
            "If we {remedy}, the moon will forgive us.",
            "Do not look at {part}. I see an omen.",
            "I dreamed we would {remedy}, and a candle laughed.",
            "Behind the veil, {thing} waits for midnight.",
        ),
        closers=(
            "That settles it. The cards may sleep.",
            "Good night. The moon is listening.",
            "Enough. The spirits want their supper.",
        ),
    ),
)

TOPICS = (
    Topic(
        "goose",
        "the goose",
        ("the beak", "the feathers", "the egg"),
        ("the goose bites the postman", "the egg is ticking", "the feathers are everywhere"),
        ("give the goose a scarf", "warm the egg", "count the feathers"),
    ),
    Topic(
        "piano",
        "the piano",
        ("the pedals", "the keys", "the lid"),
        ("the piano plays itself", "a mouse lives in the pedals", "the lid bites fingers"),
        ("tune the piano", "polish the keys", "nail down the lid"),
    ),
    Topic(
        "soup",
        "the soup",
        ("the ladle", "the onions", "the pot"),
        ("the soup has turned blue", "the ladle has vanished", "the pot keeps humming"),
        ("thin the soup", "chop the onions", "stir the pot backwards"),
    ),
    Topic(
        "clock",
        "the clock",
        ("the pendulum", "the cuckoo", "the dial"),
        ("the clock strikes thirteen", "the cuckoo swears", "the pendulum sulks"),
        ("wind the clock", "feed the cuckoo", "paint the dial"),
    ),
    Topic(
        "umbrella",
        "the umbrella",
        ("the handle", "the spokes", "the stand"),
        ("the umbrella opens indoors", "the handle is sticky", "the spokes point north"),
        ("fold the umbrella", "straighten the spokes", "empty the stand"),
    ),
    Topic(
        "kite",
        "the kite",
        ("the tail", "the string", "the breeze"),
        ("the kite is stuck in the oak", "the string is in knots", "the tail has come off"),
        ("fly the kite at dawn", "wax the string", "wait for the breeze"),
    ),
    Topic(
        "ghost",
        "the ghost",
        ("the attic", "the chains", "the bedsheet"),
        ("the ghost sneezes all night", "the attic is giggling", "the chains rattle in tune"),
        ("invite the ghost to dinner", "sweep the attic", "wash the bedsheet"),
    ),
    Topic(
        "letter",
        "the letter",
        ("the envelope", "the stamp", "the seal"),
        ("the letter is forty years late", "the envelope is empty", "the seal is broken"),
        ("answer the letter", "steam the envelope", "lick the stamp"),
    ),
    Topic(
        "cake",
        "the cake",
        ("the icing", "the cherries", "the oven"),
        ("the cake has sunk", "the icing is green", "the cherries are gone"),
        ("slice the cake", "scrape off the icing", "apologise to the oven"),
    ),
    Topic(
        "bicycle",
        "the bicycle",
        ("the saddle", "the bell", "the tyres"),
        ("the bicycle only turns left", "the bell quacks", "the tyres are flat"),
        ("pedal the bicycle uphill", "raise the saddle", "patch the tyres"),
    ),
    Topic(
        "roof",
        "the roof",
        ("the tiles", "the gutter", "the chimney"),
        ("the roof leaks into the bath", "the tiles dance at noon", "the chimney coughs"),
        ("mend the roof", "clear the gutter", "hug the chimney"),
    ),
    Topic(
        "goat",
        "the goat",
        ("the horns", "the beard", "the fence"),
        ("the goat ate the laundry", "the horns are stuck", "the fence has fallen"),
        ("milk the goat", "comb the beard", "mend the fence"),
    ),
    Topic(
        "map",
        "the treasure map",
        ("the compass", "the shovel", "the island"),
        ("the map is upside down", "the compass points at lunch", "the island has moved"),
        ("follow the map", "sharpen the shovel", "rename the island"),
    ),
    Topic(
        "hat",
        "the hat",
        ("the brim", "the ribbon", "the hatbox"),
        ("the hat shrinks on Sundays", "the ribbon hisses", "the brim is chewed"),
        ("iron the hat", "cut the ribbon", "lock the hatbox"),
    ),
    Topic(
        "telescope",
        "the telescope",
        ("the lens", "the tripod", "the comet"),
        ("the telescope sees only cheese", "the lens winks back", "the comet is early"),
        ("aim the telescope", "wipe the lens", "wave at the comet"),
    ),
    Topic(
        "parrot",
        "the parrot",
        ("the perch", "the cage", "the crackers"),
        ("the parrot tells our secrets", "the cage is open", "the crackers are stale"),
        ("bribe the parrot", "lower the perch", "buy more crackers"),
    ),
    Topic(
        "statue",
        "the statue",
        ("the marble", "the nose", "the pedestal"),
        ("the statue moved again", "the nose fell off", "the pedestal is warm"),
        ("dust the statue", "glue the nose", "scrub the marble"),
    ),
    Topic(
        "mattress",
        "the mattress",
        ("the pillow", "the quilt", "the bedpost"),
        ("the mattress snores", "the quilt is too short", "the pillow smells of fish"),
        ("turn the mattress", "shake the pillow", "saw off the bedpost"),
    ),
    Topic(
        "lantern",
        "the lantern",
        ("the wick", "the flame", "the matches"),
        ("the lantern burns purple", "the wick is soaked", "the flame leans away"),
        ("hang the lantern", "trim the wick", "dry the matches"),
    ),
    Topic(
        "portrait",
        "the portrait",
        ("the frame", "the moustache", "the varnish"),
        ("the portrait blinks", "the frame is crooked", "the moustache keeps growing"),
        ("flip the portrait", "shave the moustache", "crack the varnish"),
    ),
)

BY_NAME = {character.name: character for character in CHARACTERS}
