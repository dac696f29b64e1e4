"""Predicts the published tables: an efficiency is fitted to the first row of each table, a link to one row of the table
that compares plans, and all other rows are predicted. Computes nothing of a video, so that no card is needed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from ascend_runtime.planner import choice, models, rates, seconds, videos
from ascend_runtime.planner.choice import Fixed
from ascend_runtime.planner.facts import Arrangement, Machine, Model, Video
from ascend_runtime.planner.rates import Rates
from ascend_runtime.specs import ParallelSpec, Plan

from .ascend.published import PUBLISHED, Workload
from .report import Row

CARDS = {"a5": "950", "H100": "h100", "H20": "h20", "H200": "h200", "B200": "b200"}  # in published.py -> in rates
LINK_ROW = "cfg1_ulysses4_tp1"  # of the table of Wan 2.1 on A2
LINKS = ("ulysses", "ring", "sequence", "cfg", "tp", "fsdp")
CACHED_CARD = 560.8  # seconds on one card of the table of Wan 2.1 on A2, over which its speed-ups are
VAE_ONLY = 548.8  # of the same table: two cards that share only the VAE


@dataclass(frozen=True)
class PublishedRow:
    """seconds: as published. decoders: the cards that share the VAE; None: all of the plan."""

    name: str
    workload: Workload
    plan: tuple[int, int, int]
    seconds: float
    decoders: int | None = None


@dataclass(frozen=True)
class PublishedTable:
    """Rows of one system on one kind of cards. The first fits the efficiency; `link` names the row that fits the link;
    None: the link of `planner.rates` is used. notes: what is known about the comparison."""

    title: str
    rows: tuple[PublishedRow, ...]
    link: str | None = None
    notes: str = ""


def tables() -> list[PublishedTable]:
    known = {one.name: one for one in PUBLISHED}

    def table(title: str, *names: str, notes: str = "", decoders: int | None = None) -> PublishedTable:
        rows = (PublishedRow(name, known[name], known[name].plan, known[name].seconds, decoders) for name in names)
        return PublishedTable(title, tuple(rows), notes=notes)

    return [
        _wan_21(known["t2v_14b_480p_1_card"]),
        table("Wan 2.1, one A2, MindIE", "t2v_14b_480p_1_card", "t2v_1.3b_480p_1_card",
              notes="without caches; the second row is a blog's"),
        table("Wan 2.2, 8 A2, MindIE", "t2v_a14b_720p_8_cards", "i2v_a14b_720p_8_cards", "ti2v_5b_704p_8_cards"),
        table("Wan 2.2, 8 A2, cann-recipes of 2025", "i2v_a14b_720p_recipe_of_2025", "i2v_a14b_480p_recipe_of_2025"),
        table("Wan 2.2, 8 A2, cann-recipes", "i2v_a14b_720p_recipe", "i2v_a14b_480p_61_frames_recipe"),
        table("HunyuanVideo, A3, cann-recipes",
              *(f"hunyuan_video_720p_{kind}_a3" for kind in ("1", "ulysses4_denoising", "ulysses5", "ulysses8")),
              "hunyuan_video_720p_taylorseer_1_a3",
              notes="the second row is of the denoising only; what FBCache and TeaCache skip depends on the video"),
        table("HunyuanVideo, 950PR, cann-recipes", "hunyuan_video_720p_1_a5", "hunyuan_video_720p_ulysses8_a5",
              notes="8 cards are published as 10.0 times as fast as one, which no division of the work explains"),
        table("HunyuanVideo in MXFP8 attention, 950PR, cann-recipes", "hunyuan_video_720p_fp8_1_a5",
              "hunyuan_video_720p_fp8_ulysses8_a5"),
        table("Wan 2.2 in 4 steps, 2 A3, vLLM-Omni", "i2v_a14b_480p_4_steps_2_a3",
              "i2v_a14b_720p_121_frames_4_steps_2_a3"),
        table("Wan 2.2 in 4 steps, H100, vLLM-Omni", "i2v_a14b_480p_4_steps_1_h100", "i2v_a14b_480p_4_steps_2_h100",
              "i2v_a14b_720p_121_frames_4_steps_2_h100", notes="seconds of requests to a server"),
        *(table(f"HunyuanVideo, {card}, xDiT",
                *(f"hunyuan_video_720p_{cards}_{card.lower()}" for cards in (1, 2, 4, 8)),
                decoders=1, notes="that code shares the denoising only; what the seconds include is not published")
          for card in ("H100", "H20")),
    ]  # fmt: skip


def _wan_21(one_card: Workload) -> PublishedTable:
    """The table of 13 rows."""
    several = [one for one in PUBLISHED if one.speed_up is not None]
    return PublishedTable(
        "Wan 2.1 14B, A2, MindIE",
        (
            PublishedRow("1_card", one_card, (1, 1, 1), CACHED_CARD),
            PublishedRow("2_cards_share_the_vae", one_card, (1, 1, 1), VAE_ONLY, decoders=2),
            *(PublishedRow(one.name.removeprefix("t2v_14b_480p_"), one, one.plan, one.seconds) for one in several),
        ),
        link=LINK_ROW,
        notes="AttentionCache and sparse attention were on, at settings that are not published: the efficiency "
        "contains what they save",
    )


# Predictions


@dataclass(frozen=True)
class Fit:
    """efficiency: of the card's peak. link: times the published bandwidth; None: not fitted."""

    rates: Rates
    efficiency: float
    link: float | None


def predicted(row: PublishedRow, known: Rates) -> float:
    """The seconds of a row: of the denoising only, or of text, denoising and decoding."""
    workload = row.workload
    model, video = facts_of(workload)
    cfg, ulysses, tp = row.plan
    arrangement = Arrangement(Plan(cfg=cfg, ulysses=ulysses, tp=tp), workload.fsdp, encoder="ranks")
    stages = dict(seconds.predicted(model, video, arrangement, machine_of(workload, cfg * ulysses * tp), known))
    if row.decoders is not None:
        shared = replace(arrangement, plan=Plan(ulysses=row.decoders))
        stages["decode"] = seconds.predicted(model, video, shared, machine_of(workload, row.decoders), known)["decode"]
    if workload.denoising:
        return stages["denoise"]
    return sum(taken for stage, taken in stages.items() if stage != "load")


def facts_of(workload: Workload) -> tuple[Model, Video]:
    model = models.published(workload.folder, workload.kind)
    return model, videos.video_of(
        model, workload.size, workload.sample, workload.acceleration, from_image=workload.task != "t2v"
    )


def cards(row: PublishedRow) -> int:
    return row.decoders or math.prod(row.plan)


def machine_of(workload: Workload, ranks: int) -> Machine:
    card = card_of(workload)
    return Machine(workload.kind, card, ranks, rates.CARD_FIGURES[card].memory, 2 * 10**12)


def card_of(workload: Workload) -> str:
    return CARDS.get(workload.card, workload.card)


def fitted(table: PublishedTable) -> Fit:
    first, card = table.rows[0], card_of(table.rows[0].workload)
    efficiency = _solved(lambda x: predicted(first, _rates(card, x, None)) - first.seconds, 0.01, 2)
    if table.link is None:
        return Fit(_rates(card, efficiency, None), efficiency, None)
    row = next(row for row in table.rows if row.name == table.link)
    link = _solved(lambda x: predicted(row, _rates(card, efficiency, x)) - row.seconds, 0.01, 100)
    return Fit(_rates(card, efficiency, link), efficiency, link)


def _rates(card: str, efficiency: float, link: float | None) -> Rates:
    known = rates.of_card(card, efficiency)
    if link is None:
        return known
    costs = known.costs | {axis: known.costs[axis] / link for axis in LINKS}
    return replace(known, costs=costs)


def _solved(error: Callable[[float], float], low: float, high: float) -> float:
    """Where a falling function is zero, by bisection of its argument's logarithm."""
    for _ in range(40):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if error(middle) > 0 else (low, middle)
    return math.sqrt(low * high)


# Choices


@dataclass(frozen=True)
class ChosenPlan:
    """A choice among the plans that a table has for a number of cards. published, best: seconds of the chosen plan and
    of the fastest one, as published."""

    cards: int
    plan: Plan
    published: float
    best: float

    @property
    def slower(self) -> float:
        return self.published / self.best - 1


def chosen_plans(table: PublishedTable, known: Rates) -> Iterator[ChosenPlan]:
    """For each number of cards of which a table compares several plans."""
    by_plan = {row.plan: row for row in table.rows if row.decoders is None}
    for cards in sorted({math.prod(plan) for plan in by_plan}):
        alike = {plan: row for plan, row in by_plan.items() if math.prod(plan) == cards}
        if len(alike) == 1:
            continue
        workload = next(iter(alike.values())).workload
        model, video = facts_of(workload)
        fixed = Fixed(ParallelSpec(ring_degree=1, fsdp=workload.fsdp), encoder="ranks", tiles="whole")
        made = choice.choose(model, video, machine_of(workload, cards), known, fixed).chosen.arrangement.plan
        row = alike[made.cfg, made.ulysses, made.tp]
        yield ChosenPlan(cards, made, row.seconds, min(row.seconds for row in alike.values()))


# The benchmark


def run(quick: bool) -> Iterator[Row]:
    """Prints the tables; yields the predicted seconds of each row that was not fitted. quick: no difference, as it
    takes seconds."""
    errors = []
    for table in tables():
        fit = fitted(table)
        print(f"\n{table.title}" + (f" ({table.notes})" if table.notes else ""))
        link = "" if fit.link is None else f", link {fit.link:.2f} of that in planner.rates"
        print(f"  fitted: {fit.efficiency:.2f} of the peak{link}")
        for row in table.rows:
            made, of_fit = predicted(row, fit.rates), row.name in (table.rows[0].name, table.link)
            error = made / row.seconds - 1
            errors += [] if of_fit else [abs(error)]
            print(f"  {row.name:42} published {row.seconds:7.1f} s  predicted {made:7.1f} s  "
                  f"{'fitted' if of_fit else f'{error:+.1%}'}")  # fmt: skip
            if not of_fit:
                yield _row(table, row, made, fit)
        for one in chosen_plans(table, fit.rates):
            what = "the published best" if one.slower == 0 else f"published {one.slower:.1%} slower than the best"
            print(f"  {one.cards} cards: chosen cfg {one.plan.cfg} x ulysses {one.plan.ulysses}, {what}")
    print(f"\n{len(errors)} rows predicted: median error {statistics.median(errors):.1%}, largest {max(errors):.1%}")


def _row(table: PublishedTable, row: PublishedRow, made: float, fit: Fit) -> Row:
    context = {"table": table.title, "source": row.workload.source, "error": round(made / row.seconds - 1, 4),
               "efficiency": round(fit.efficiency, 3), "not_compared": "predicted, for another system"}  # fmt: skip
    return Row(name=f"plan.published.{row.name}", value=round(made, 1), unit="s", better="lower", baseline=row.seconds,
               context=context)  # fmt: skip
