"""What is worth telling of how records were written for a base, by what was counted while they were."""

from collections import Counter
from collections.abc import Mapping

from thimble.data.template import ChatTemplate
from thimble.errors import plural


def notes_of(
    seen: Counter[str], first_marks: Mapping[str, str], template: ChatTemplate | None, loss_on: str
) -> list[str]:
    """What the user should know; `first_marks` are the first marks of templates that stood in a text, by their kind."""
    notes = ["target tokens: every token" if loss_on == "all" else _learned(seen)] if seen else []
    if seen["raw"]:
        notes.append("the base has no chat template: prompt and completion are joined as they stand")
    if seen["marked as here"]:
        notes.append(
            f"marks of turns stand in the plain text of {plural(seen['marked as here'], 'row')}, first "
            f"{first_marks['marked as here']}: every token is learned, those of questions too; messages, or "
            "prompt and completion, teach answers alone"
        )
    if template is None:
        return notes
    if seen["without system"] and template.default_system:
        notes.append(
            f'the chat template adds a system prompt where there is none: "{template.default_system}". '
            "Give a system message to replace it."
        )
    if seen["with system"] and not template.takes_system:
        notes.append("the chat template has no system role: system text is put in front of the first user turn")
    if seen["tools as text"]:
        notes.append("the chat template does not know tools: they are written into the system message as JSON")
    if seen["chat"] and template.uses_date:
        notes.append("the chat template writes the date into every prompt: today's rows differ from tomorrow's")
    if seen["chat"] and template.isolation:
        notes.append(f"the chat template runs in a process of its own, but this system lets it {template.isolation}")
    if seen["goes on"]:
        notes.append(f"{plural(seen['goes on'], 'conversation')}: what follows the last learned answer is left out")
    if seen["without names"]:
        notes.append(f"{plural(seen['without names'], 'row')}: the chat template does not write the name of a speaker")
    if seen["last only"]:
        notes.append(
            f"{plural(seen['last only'], 'conversation')}: only the last assistant turn is learned, because the "
            "chat template rewrites earlier ones"
        )
    return notes


def warnings_of(seen: Counter[str], first_marks: Mapping[str, str]) -> list[str]:
    """What may spoil what is learned."""
    warnings = []
    if seen["marked"]:
        warnings.append(
            f"marks of a chat template stand in the text of {plural(seen['marked'], 'row')}, first "
            f"{first_marks['marked']}: the template of the base writes such marks itself, so rows that were "
            "written with a template already teach a form that nobody will ask for"
        )
    if seen["marked otherwise"]:
        warnings.append(
            f"marks of another chat template than the base's stand in the plain text of "
            f"{plural(seen['marked otherwise'], 'row')}, first {first_marks['marked otherwise']}: questions "
            "are learned too, and nobody asks this base in that form; give messages, which its own template writes"
        )
    if seen["without thoughts"]:
        warnings.append(
            f"the chat template does not write the thinking (reasoning_content) of "
            f"{plural(seen['without thoughts'], 'row')}: what is learned there are answers without it"
        )
    if seen["glued"]:
        warnings.append(
            f"prompt and completion of {plural(seen['glued'], 'row')} run into one word, since no chat template of the "
            r"base stands between them: let prompts end with a line break, as --prompt-template '{prompt}\n' does"
        )
    if seen["unwritten"]:
        warnings.append(
            f"the chat template does not write all messages of {plural(seen['unwritten'], 'row')}: what is learned "
            "there lacks them; look at the template, or use a base whose template is intact"
        )
    if seen["overruled"]:
        warnings.append(
            f"--loss-on all learns whole rows: {plural(seen['overruled'], 'row')} with messages that are marked as "
            "not learned too"
        )
    if seen["open"]:
        warnings.append(
            f"the last answer of {plural(seen['open'], 'row')} ends with no token that ends an answer: what is "
            "learned there does not say when to stop"
        )
    return warnings


def context_warnings_of(seen: Counter[str], tokens: int) -> list[str]:
    """What became of rows and questions that are longer than the context, which has so many tokens."""
    warnings, context = [], f"{tokens:,} tokens"
    if seen["beyond"]:
        warnings.append(
            f"{plural(seen['beyond'], 'row')} longer than the context of the base ({context}), for which it was "
            f"not made: --seq-len {tokens} cuts them there"
        )
    if seen["shortened"]:
        warnings.append(
            f"{plural(seen['shortened'], 'conversation')} longer than the context of the base ({context}): asked "
            "without the oldest turns"
        )
    if seen["unanswerable"]:
        warnings.append(
            f"{plural(seen['unanswerable'], 'question')} longer than the context of the base ({context}): not answered"
        )
    return warnings


def _learned(seen: Counter[str]) -> str:
    turns = "all assistant turns" + " but those that are marked as not learned" * bool(seen["with marks"])
    parts = [turns] * bool(seen["chat"]) + ["completions"] * bool(seen["raw"])
    return "target tokens: " + " and ".join(parts + ["every token of plain text"] * bool(seen["text"]))
