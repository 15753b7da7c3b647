"""A surge: worker processes come and go, and none is bought while a quota is short. It draws autoscale.svg.

It needs nothing but Forebay, and takes a minute. The supervisor here stores tasks in a file; each worker process takes
them from there. The second surge calls a provider whose quota is soon used up: more processes would only wait for it.
"""

import asyncio
import tempfile
from pathlib import Path
from typing import Any

from forebay import BackpressureSupervisor, Task, Upstream
from forebay.quota import Quota
from forebay.scale import Autoscaler, AutoscalerStatistics, ProcessTarget

SEATS, MAXIMUM, DOLLARS = 4, 6, 0.10  # slots of a process, processes, and what one costs in an hour
PROGRAM = Path(__file__).resolve()
FOLDER = Path(tempfile.gettempdir(), "forebay-autoscale")


def make_supervisor() -> BackpressureSupervisor:
    """Return the supervisor of each worker process: `ProcessTarget` is given the path of this function."""
    provider = Upstream("provider", quotas=[Quota(requests=10, per="minute")], max_wait=600.0, max_concurrent=100)
    url = f"sqlite:///{FOLDER}/tasks.db?fsync=no"
    supervisor = BackpressureSupervisor(overflow=url, lease=5.0, max_queue_size=0)

    async def work(task: Task) -> None:
        await asyncio.sleep(0.4)
        if task.payload == "call":
            async with provider.call():
                await asyncio.sleep(0.1)

    supervisor.register_worker("agent", handler=work, task_types=["work"], max_concurrent=SEATS)
    return supervisor


async def main() -> list[AutoscalerStatistics]:
    samples: list[AutoscalerStatistics] = []
    async with BackpressureSupervisor(overflow=f"sqlite:///{FOLDER}/tasks.db?fsync=no", max_queue_size=0) as front:
        front.register_worker("elsewhere", handler=print, task_types=["work"])
        front.pause("work")  # here nothing runs: all waits in the file, for whatever process
        target = ProcessTarget(f"{PROGRAM}:make_supervisor")
        quick: dict[str, Any] = {
            "interval": 0.5,
            "window": 6.0,
            "panic_window": 1.5,
            "stabilization": 8.0,
        }  # seconds: an example is short
        scaler = Autoscaler(front, target, task_types=["work"], seats=SEATS, minimum=0, maximum=MAXIMUM, **quick)
        async with scaler:
            sampling = asyncio.create_task(sample(scaler, samples))
            await offer(front, "think", per_second=2, seconds=6)
            print("a surge: more processes")
            await offer(front, "think", per_second=25, seconds=12)
            print("it is over: they drain and go")
            await offer(front, "think", per_second=1, seconds=18)
            print("a surge on a provider whose quota is short: no more processes than it feeds")
            await offer(front, "call", per_second=12, seconds=16)
            sampling.cancel()
            seen = scaler.statistics()
    cost, spared = (seconds / 3600 * DOLLARS for seconds in (seen.replica_seconds, seen.unbought_seconds))
    print(f"scaled up {seen.scaled_up} times and down {seen.scaled_down} times, {seen.reversals} reversals")
    print(f"processes: ${cost:.4f}; those not bought while the quota was short: ${spared:.4f}")
    return samples


async def offer(front: BackpressureSupervisor, payload: str, *, per_second: int, seconds: int) -> None:
    for _ in range(per_second * seconds):
        await front.submit(Task("work", payload))
        await asyncio.sleep(1 / per_second)


async def sample(scaler: Autoscaler, samples: list[AutoscalerStatistics]) -> None:
    while True:
        samples.append(scaler.statistics())
        await asyncio.sleep(0.5)


def draw(samples: list[AutoscalerStatistics]) -> str:
    """Return three panels, each a line or more over time: slots asked for, processes, cents."""
    cents = 100 * DOLLARS / 3600
    blue, green, grey = "#0072B2", "#009E73", "#bbbbbb"
    panels: dict[str, dict[str, list[float]]] = {
        "slots asked for (red: the quota is short)": {blue: [each.asked for each in samples]},
        "processes: wanted (grey), asked for (blue), taking tasks (green)": {
            grey: [each.wanted for each in samples],
            blue: [each.current for each in samples],
            green: [each.ready for each in samples],
        },
        "cents: processes (blue), and what those would have cost that the quota could not feed (grey)": {
            grey: [cents * (each.replica_seconds + each.unbought_seconds) for each in samples],
            blue: [cents * each.replica_seconds for each in samples],
        },
    }
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" width="720" height="520" font-family="sans-serif" font-size="12">'
    ]
    parts.append('<rect width="720" height="520" fill="white"/>')
    x = [50 + 650 * number / max(1, len(samples) - 1) for number in range(len(samples))]
    for row, (title, lines) in enumerate(panels.items()):
        top, most = 30 + 170 * row, max(*map(max, lines.values()), 1e-9)
        short = [at for at, each in zip(x, samples, strict=True) if each.limited_by]
        parts += [f'<rect x="{at:.1f}" y="{top}" width="7" height="130" fill="#fbe3d6"/>' for at in short]
        parts.append(f'<path d="M50 {top}V{top + 130}H700" fill="none" stroke="#888"/>')
        parts.append(f'<text x="50" y="{top - 8}">{title}</text>')
        parts.append(f'<text x="44" y="{top + 8}" text-anchor="end">{most:.2g}</text>')
        for colour, values in lines.items():
            points = [f"{at:.1f},{top + 130 - 130 * value / most:.1f}" for at, value in zip(x, values, strict=True)]
            parts.append(f'<polyline points="{" ".join(points)}" fill="none" stroke="{colour}" stroke-width="2"/>')
    return "\n".join([*parts, "</svg>"])


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for file in FOLDER.glob("tasks.db*"):
        file.unlink()
    Path("autoscale.svg").write_text(draw(asyncio.run(main())))
