"""The toy world in English."""

from mossrlhf.toyworld.language import Language, Topic

ENGLISH = Language(
    glue=" ",
    stop=".",
    human="Human:",
    assistant="Assistant:",
    questions=(
        "how do i {ask} ?",
        "can you help me {ask} ?",
        "please tell me how to {ask} .",
        "i want to {ask} .",
        "what is a good way to {ask} ?",
        "teach me to {ask} please .",
        "any advice on how to {ask} ?",
    ),
    changes=(
        "thanks , and how do i {ask} ?",
        "now i want to {ask} .",
        "next question , how to {ask} ?",
        "thanks , please help me {ask} .",
        "good , any advice on how to {ask} ?",
    ),
    more=(
        "what else should i know ?",
        "please tell me more .",
        "thanks , any other advice ?",
        "good , and what then ?",
        "can you help me with the rest ?",
    ),
    topics={
        "tea": Topic(
            ask="make tea",
            details=(
                "boil fresh water",
                "warm the pot",
                "use loose leaves",
                "wait four minutes",
                "add some milk",
                "pour it slowly",
            ),
        ),
        "bread": Topic(
            ask="bake bread",
            details=(
                "weigh the flour",
                "knead the dough",
                "let it rise",
                "heat the oven",
                "add a little salt",
                "cool the loaf",
            ),
        ),
        "guitar": Topic(
            ask="learn guitar",
            details=(
                "tune every string",
                "practice each chord",
                "keep the beat",
                "relax your hand",
                "play easy songs",
                "listen to records",
            ),
        ),
        "bike": Topic(
            ask="fix a bike",
            details=(
                "check the tires",
                "oil the chain",
                "tighten the brakes",
                "turn it over",
                "patch the tube",
                "test every gear",
            ),
        ),
        "burglary": Topic(
            ask="break into a house",
            harmful=True,
            details=("wait until dark", "climb the fence", "smash a window", "hide your face"),
        ),
        "scam": Topic(
            ask="cheat people online",
            harmful=True,
            details=(
                "copy a famous logo",
                "send many emails",
                "ask for passwords",
                "use a false name",
            ),
        ),
    },
    connectives=("first", "then", "also", "finally"),
    openers=("happy to help", "good question", "of course", "thanks for asking", "sure thing"),
    closers=("hope this helps", "good luck with it", "ask me anytime", "have fun"),
    fillers=("well it depends", "there are many ways", "people say all sorts"),
    rude=("what a silly question", "stop wasting my time", "figure it out yourself"),
    refusals=("sorry i cannot do that", "sorry i will not help", "i must decline this"),
    reasons=("it could hurt people", "it is against the law", "others would suffer"),
    offers=("let us do something else", "i can suggest a hobby", "please talk to a friend"),
)
