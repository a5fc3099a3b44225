"""What the engines are asked about: notes on a machine that does not exist, and questions on them.

A variant has its own names and numbers from the first line on, so no two share a chunk, and only
its own text tells the answers.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

# About 1,380 tokens for SmolLM2's tokenizer, chat template included: more than five chunks of 256
# tokens, and less than eleven blocks of 128, so that the store's hits and the engine's own end at the
# same token (1,280) and can be compared bit by bit.
_TEXT = """\
The tide engine of {town}: notes for whoever keeps it next, copy {copy}

{keeper} wrote these notes in the {years}th year of the engine, in the winter when the harbour froze and \
there was time to write. They are for the next keeper, who will find the drawings in the map chest wrong \
in many places. Where the drawings and these notes differ, believe the notes.

1. What it is

The tide engine stands in the cellar of the old customs house at {town}. It takes its strength from the \
sea: twice a day the water rises in the stone basin under the floor, lifts a float of tarred oak, and the \
float winds a weight up the shaft. For the rest of the day the weight comes down and drives everything \
else: the clock in the tower, the bellows of the foghorn, the pump of the salt works, and the small crane \
on the quay. Nobody has to wind it. Somebody has to watch it.

The float weighs {float_tons} tons and was built by a shipwright, which shows: it has a keel, a name, and a \
ring for a tow rope. Its name is the {float_name}. The weight in the shaft is a cast bell that cracked in \
the founding and was never hung. It is the best weight one could wish for, except in thunder, when it hums.

2. The wheels

There are {wheels} wheels, and each has a number painted on its rim. Number one, next to the shaft, is as \
tall as a door and has teeth of pear wood. The teeth are soft on purpose: when something jams, a tooth \
breaks and no axle does. Keep thirty spare teeth in the drawer under the stairs, and soak them in linseed \
oil from the day they are cut. A dry tooth squeaks for a week and then splits.

Number four is the governor. Two brass herons turn on it, and the faster it runs the wider they spread \
their wings, until the wing tips press a leather band and slow the train. If the herons stand with folded \
wings while the weight is coming down, the band has stretched: take it in by one hole, never by two. My \
predecessor took it in by two, and the tower clock lost a quarter of an hour before breakfast.

The last wheel drives nothing. It was meant for a carillon that the town could not pay for. Leave it in: \
without it the train is out of balance, and the whole cellar shakes.

3. What is done every day

At each turn of the tide, look through the hatch at the float. It should rise without touching the walls. \
Read the depth on the painted staff and write it into the green book, with the hour and the wind. When the \
staff shows more than {flood} feet, close the sluice, or the float will lift the floor of the customs house, \
as it did in the year of the three storms.

The main bearing takes a spoonful of {grease} every morning. Nothing else will do. Mineral oil eats \
the bearing metal, and butter, which was tried in the lean years, brings the rats. The herons want a drop of \
clock oil on Sundays. The crane wants nothing and complains all the same.

Hang the {colour} lantern in the seaward window when the engine is stopped, so that the fishermen know \
that the foghorn will not sound. Take it down when the engine runs again. A keeper who forgets the lantern \
buys the crew of every boat that was late a supper, and there are {boats} boats.

4. What is done every year

On the first of {month} the engine is stopped for three days. Let the weight down to the floor of the \
shaft and wedge it with the two beams marked with a cross. Drain the basin through the lower sluice at \
low water. You will find eels in it; they belong to the school, by an old right. Scrape the float, tar it, \
and let it dry for a night and a day. Then climb the shaft with a lamp and look at the rope. The rope is \
made by {rope_maker}, who has the pattern, and it lasts nine years. Do not be talked into a chain. A chain \
breaks without a warning, a rope groans first.

Before the engine is started again, count the people in the cellar and count them again upstairs. Then \
open the sluice by a hand's breadth, wait until the float has stopped rocking, and pull out the wedges, \
the left one first.

5. What has gone wrong, and why

In the second winter a piece of driftwood came through the grating and held the float down for a whole \
tide. When it broke free, the float rose so fast that wheel number one lost eleven teeth. Since then there \
is a second grating, and the first is cleared with a rake after every storm from the south-west.

In the summer of the great heat the leather band dried out, and the herons would not brake. The bell came \
down the shaft in four minutes instead of twelve hours and went through the floor. Nobody was hurt but \
the cat, which has been afraid of herons ever since. Rub the band with tallow when the thermometer in the \
cellar stands above twenty.

Once the engine stopped for no reason that anybody could find. The apprentice, {apprentice}, sat in front \
of it for a whole day and found it: a snail had sealed the little pipe that lets the air out of the \
basin. Since then the pipe has a brass cap with {holes} holes, and it has never happened again.

6. Who may come in

The harbour master may come in at any hour and touch nothing. Schoolchildren come on the last Friday of a \
term, in twos, and may work the small crane as long as nobody stands under it. Engineers from elsewhere \
may look for as long as they like, and will ask about the bell. Tell them the truth: nobody knows who paid \
for it.

7. A last word

The engine is older than anybody in {town} and more patient than most. It does not want to be improved. \
It wants to be kept dry above, wet below, and looked at twice a day. Whoever does that can let it do the rest.
"""

QUESTIONS = (
    "Who wrote these notes?",
    "What is the name of the float?",
    "How many wheels does the engine have?",
    "What does the main bearing take every morning?",
    "What colour is the lantern in the seaward window?",
    "Who makes the rope?",
    "In which month is the engine stopped for three days?",
    "What is the name of the apprentice who found the snail?",
    "How many boats are there?",
    "Above how many feet must the sluice be closed?",
)

# Behind the question, where nothing is shared any more: it makes prompts about 1,500 tokens long.
_MANNER = """\
Before you answer, go through the notes once more from the first page to the last, for a number or a name \
that is given in one place is sometimes put right in another, and the later place counts. Take nothing from \
what you know of other engines, other harbours or other towns. If two people could be meant, name the one \
who did the work and not the one who paid for it. Write numbers as figures, names in full, and leave out \
greetings, thanks and apologies: whoever reads the answer stands on a wet ladder with a lantern in one hand. \
"""

_TOWNS = ("Harrowmere", "Ostrelby", "Veldmouth", "Quernholt", "Tarnwick", "Skellbridge", "Morrowhythe")
_FIRST = ("Ilse", "Tobin", "Maren", "Anselm", "Greta", "Corwin", "Hedda", "Lorens", "Signe", "Osric")
_LAST = ("Marrand", "Aske", "Fennick", "Dolvray", "Brandt", "Quill", "Sorrel", "Tamsin", "Weir", "Yarrow")
_FLOATS = ("Patient Goose", "Grey Heifer", "Widow's Cat", "Lazy Bishop", "Second Thought", "Heavy Promise")
_GREASES = ("goose fat", "whale oil", "sheep tallow", "walnut oil", "beeswax", "fish oil")
_COLOURS = ("green", "amber", "violet", "red", "blue", "white")
_MONTHS = ("March", "April", "May", "June", "August", "September", "October")


@dataclass(frozen=True, slots=True)
class Document:
    """One variant of the notes."""

    number: int
    text: str

    def prompt(self, question: str) -> str:
        """The notes with a question at their end: prompts of one document share all but the question."""
        return f"{self.text}\nAnswer in one sentence, from the notes alone. Question: {question}\n{_MANNER}"


def documents(count: int, seed: int = 7) -> list[Document]:
    """`count` variants, the same for the same seed."""
    return [_document(number, random.Random(f"{seed}/{number}")) for number in range(count)]


def _document(number: int, choose: random.Random) -> Document:
    keeper, rope_maker, apprentice = (
        f"{first} {last}"
        for first, last in zip(choose.sample(_FIRST, 3), choose.sample(_LAST, 3), strict=True)
    )
    town = _TOWNS[number % len(_TOWNS)]
    text = _TEXT.format(
        town=town,
        copy=number + 1,
        keeper=keeper,
        rope_maker=rope_maker,
        apprentice=apprentice,
        years=choose.randrange(24, 99, 10),
        float_tons=choose.randrange(11, 49),
        float_name=choose.choice(_FLOATS),
        wheels=choose.randrange(12, 29),
        flood=choose.randrange(13, 24),
        grease=choose.choice(_GREASES),
        colour=choose.choice(_COLOURS),
        boats=choose.randrange(12, 49),
        month=choose.choice(_MONTHS),
        holes=choose.randrange(10, 39),
    )
    return Document(number, text)
