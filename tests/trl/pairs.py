"""Small preference data in the four layouts that TRL's tests train on, and a script of TRL's."""

import datasets

COLORS = ("red", "blue", "green", "grey")
LAYOUTS = (
    "standard_preference",
    "standard_implicit_prompt_preference",
    "conversational_preference",
    "conversational_implicit_prompt_preference",
)


def row(layout: str, i: int) -> dict[str, object]:
    """One pair; an implicit prompt is what begins both answers."""
    question, color = f"What color is number {i}?", COLORS[i % len(COLORS)]
    chosen, rejected = f" It is {color}.", f" It is not {color}, I think."
    if layout == "standard_preference":
        return {"prompt": question, "chosen": chosen, "rejected": rejected}
    if layout == "standard_implicit_prompt_preference":
        return {"chosen": question + chosen, "rejected": question + rejected}
    prompt = [{"role": "user", "content": question}]
    answers = {
        name: [{"role": "assistant", "content": text.strip()}]
        for name, text in (("chosen", chosen), ("rejected", rejected))
    }
    if layout == "conversational_preference":
        return {"prompt": prompt} | answers
    return {name: prompt + answer for name, answer in answers.items()}


def dataset(layout: str = LAYOUTS[0]) -> datasets.DatasetDict:
    """The splits `train`, of 17 pairs, and `test`, of 2: as many as TRL's tests have."""
    return datasets.DatasetDict(
        {
            "train": datasets.Dataset.from_list([row(layout, i) for i in range(17)]),
            "test": datasets.Dataset.from_list([row(layout, i) for i in range(17, 19)]),
        }
    )
