"""How many replicas of each kind a number of short queries a second needs, from what each of them costs."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Rates:
    """What one replica does in a second, as measured.

    `python -m loadtest.growth` measured the ingress, which tokenizes short queries itself: 1,282 to 1,408 with few at
    once, 1,769 to 2,749 with many. An H100 embeds 2.6 million tokens/s of such queries, but the process that feeds
    it takes 0.0373 ms for one (loadtest/results/gpu.md, 9w-256c).
    """

    ingress_requests: float = 1324.0
    cpu_tokens: float = 14_500.0  # two cores
    gpu_tokens: float = 310_000.0


def replicas(requests_per_s: float, tokens: float, rates: Rates, target_utilization: float) -> dict[str, int]:
    """Replicas that carry the load at the utilization that is planned for.

    >>> replicas(1000, 11, Rates(), 0.7)
    {'ingress': 2, 'tokenizer': 1, 'cpu model': 2, 'gpu model': 1}
    """

    def needed(work: float, rate: float) -> int:
        return max(1, math.ceil(work / rate / target_utilization))

    return {
        "ingress": needed(requests_per_s, rates.ingress_requests),
        "tokenizer": 1,  # they do texts that are long; one is kept for them
        "cpu model": needed(requests_per_s * tokens, rates.cpu_tokens),
        "gpu model": needed(requests_per_s * tokens, rates.gpu_tokens),
    }
