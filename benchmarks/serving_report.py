"""The tables of the servers and of vLLM's engine, which `report.py` writes together with its own."""

from pathlib import Path

from blocks import (
    PAGES,
    RESULTS,
    Cell,
    Result,
    Row,
    Table,
    conditions,
    format_spread,
    load_results,
    render,
    replace_block,
)

DOCUMENT = PAGES / "serving.md"
CLIENTS = ("1", "8", "32", "8, one picture")
FORMER_CLIENTS = ("1", "2", "4", "8")
PATHS = {
    "vllm": "`--engine vllm`",
    "transformers": "`--engine transformers`",
    "batch": "`batch_generate`, as many rows as clients",
}
AIMED = ("batch", "8")  # vLLM should be at least 1.5 times as fast as these
AIM = "1.5 or more"


def named(clients: str) -> str:
    """Return the title of a number of clients in tables."""
    return clients.replace("picture", "image")


def figure(kind: str, path: str, clients: str) -> Cell:
    def cell(result: Result) -> str | None:
        return format_spread(result.get(kind, {}).get(path, {}).get(clients))

    return cell


def rows() -> list[Row]:
    """Return the rows, ratios first, since absolute times depend on the machine."""
    lines = []
    for clients in CLIENTS:
        for path in ("transformers", "batch"):
            name = f"requests per second, vLLM / {PATHS[path]}, clients: {named(clients)}"
            lines.append(Row(name, AIM if (path, clients) == AIMED else "", figure("rate_ratios", path, clients)))
        name = f"time to first token, vLLM / {PATHS['transformers']}, clients: {named(clients)}"
        lines.append(Row(name, "", figure("first_token_ratios", "transformers", clients)))
    for clients in CLIENTS:
        for path, words in PATHS.items():
            name = f"requests per second, {words}, clients: {named(clients)}"
            lines.append(Row(name, "", figure("requests_per_second", path, clients)))
    for clients in CLIENTS:
        for path in ("vllm", "transformers"):
            name = f"seconds to first token, {PATHS[path]}, clients: {named(clients)}"
            lines.append(Row(name, "", figure("first_token_seconds", path, clients)))
    return lines


def measured_with(result: Result) -> str:
    settings, versions = result["settings"], result["versions"]
    engine = next((f", {name} {version}" for name, version in versions.items() if name.startswith("vllm")), "")
    width, height = settings["photo"]
    return (
        f"{conditions(result)}{engine}; size `{settings['size']}`, {settings['rounds']} rounds, "
        f"{settings['new_tokens']} tokens of each answer, images of {width} x {height} pixels"
    )


COLUMNS = {
    "CPU": "serving_cpu.json",
    "CPU, bfloat16": "serving_cpu_bfloat16.json",
    "GPU": "serving_cuda.json",
}
TABLE = Table("serving", DOCUMENT, COLUMNS, rows(), measured_with)


def ratio_to_former(kind: str, clients: str) -> Cell:
    def cell(result: Result) -> str | None:
        return format_spread(result.get(f"{kind}_ratios_to_former", {}).get(clients))

    return cell


def former_rows() -> list[Row]:
    """Return the rows that compare the server with its former version, which answered one request after the other."""
    kinds = {"rate": "requests per second", "first_token": "time to first token"}
    return [
        Row(f"{words}, decoded together / in turns, clients: {named(clients)}", "", ratio_to_former(kind, clients))
        for clients in FORMER_CLIENTS
        for kind, words in kinds.items()
    ]


TOGETHER = Table("serving-together", DOCUMENT, {"CPU": "serving_former_cpu.json"}, former_rows(), measured_with)


# the comparisons of `engine.py`, with the target for vLLM's batches
ENGINES = {
    "vllm, oneDNN by batch, oneDNN": ("vLLM / `batch_generate`, both with oneDNN", "1.3 or more"),
    "vllm by batch": ("vLLM / `batch_generate`, both without oneDNN", ""),
    "vllm, oneDNN by batch": ("vLLM with oneDNN / `batch_generate` without", ""),
    "vllm, oneDNN by vllm": ("vLLM with oneDNN / vLLM without", ""),
    "batch, oneDNN by batch": ("`batch_generate` with oneDNN / `batch_generate` without", ""),
}
ENGINE_WAYS = {
    "vllm": "vLLM without oneDNN",
    "batch": "`batch_generate` without oneDNN",
    "vllm, oneDNN": "vLLM with oneDNN",
    "batch, oneDNN": "`batch_generate` with oneDNN",
}
PARTS = ("tiles", "overviews", "language model")


def engine_rows() -> list[Row]:
    """Return the rows of eight concurrent questions, ratios first."""
    lines = []
    for pair, (words, aim) in ENGINES.items():
        lines.append(Row(f"requests per second, {words}", aim, _engine_figure("rate_ratios", pair)))
    for way, words in ENGINE_WAYS.items():
        lines.append(Row(f"requests per second, {words}", "", _engine_figure("requests_per_second", way)))
    for way in ("vllm", "vllm, oneDNN"):
        for part in PARTS:
            lines.append(Row(f"seconds of {part}, {ENGINE_WAYS[way]}", "", _engine_figure("part_seconds", way, part)))
    return lines


def _engine_figure(*path: str) -> Cell:
    def cell(result: Result) -> str | None:
        found = result
        for name in path:
            found = found.get(name, {})
        return format_spread(found or None)

    return cell


ENGINE_COLUMNS = {"CPU": "engine_cpu.json", "CPU, bfloat16": "engine_cpu_bfloat16.json"}
ENGINE_TABLE = Table("engine", DOCUMENT, ENGINE_COLUMNS, engine_rows(), measured_with)


def update(document: str, folder: Path) -> str:
    """Return the document with the tables from the results in `folder`."""
    for table in (TABLE, TOGETHER, ENGINE_TABLE):
        document = replace_block(document, table, render(table, load_results(table, folder)))
    return document


def write() -> None:
    """Update the document."""
    DOCUMENT.write_text(update(DOCUMENT.read_text(), RESULTS))
