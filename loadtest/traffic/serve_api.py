"""What Serve itself says of its replicas: `GET /api/serve/applications/` of Ray's dashboard.

Source: https://docs.ray.io/en/latest/serve/api/index.html, "Serve REST API", V2.
"""

import json
import urllib.request
from collections.abc import Mapping
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit

from loadtest.traffic.run import Replicas

DASHBOARD_PORT = 8265
TIMEOUT_S = 2.0


class Untold(Exception):
    """Serve's account can't be had; the message says why."""


def dashboard_beside(url: str) -> str:
    """Where the dashboard of a service is, unless it was moved.

    >>> dashboard_beside("http://127.0.0.1:8000/v1")
    'http://127.0.0.1:8265'
    """
    host = urlsplit(url).hostname or ""
    return f"http://{f'[{host}]' if ':' in host else host}:{DASHBOARD_PORT}"


def is_here(dashboard: str) -> bool:
    """Whether a dashboard is on this machine.

    >>> is_here("http://127.0.0.1:8265"), is_here("http://embeddings.example.com:8265")
    (True, False)
    """
    return urlsplit(dashboard).hostname in ("127.0.0.1", "localhost", "::1")


def ask(dashboard: str, token: str | None = None) -> dict[str, Replicas]:
    """The replicas of each deployment; raises Untold."""
    headers = {"authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(f"{dashboard.rstrip('/')}/api/serve/applications/", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            return replicas(json.load(answer))
    except HTTPError as error:
        if error.code in (401, 403):
            raise Untold("it wants a token: set RAY_AUTH_TOKEN to what `ray get-auth-token` prints") from None
        raise Untold(f"status {error.code}") from None
    except (OSError, HTTPException) as error:
        raise Untold(type(getattr(error, "reason", error)).__name__) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise Untold("what answers is not Ray's dashboard") from None


def replicas(details: Mapping[str, Any]) -> dict[str, Replicas]:
    """The replicas of each deployment in Serve's own account; the application is named where there are several."""
    applications = details["applications"]
    found = {
        name if len(applications) == 1 else f"{application}/{name}": Replicas(
            sum(replica["state"] == "RUNNING" for replica in deployment["replicas"]), deployment["target_num_replicas"]
        )
        for application, content in applications.items()
        for name, deployment in content["deployments"].items()
    }
    return dict(sorted(found.items()))  # Serve's order changes
