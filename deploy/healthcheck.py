"""The health check of the image: it asks for /healthz, and exits with 0 if the answer is 200.

The port is in FOREBAY_HEALTH_PORT. No HTTP proxy of the environment is asked: it is this machine.
"""

import http.client
import os
import sys

_TIMEOUT = 3.0  # seconds; less than that of the check


def check(port: int) -> int:
    """Return the exit status: 0 if what listens on this port is well."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_TIMEOUT)
    try:
        connection.request("GET", "/healthz")
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        sys.stderr.write(f"/healthz on port {port}: {error}\n")
        return 1
    finally:
        connection.close()
    sys.stdout.write(f"/healthz on port {port}: {status}\n")
    return 0 if status == http.client.OK else 1


if __name__ == "__main__":
    sys.exit(check(int(os.environ.get("FOREBAY_HEALTH_PORT", "8787"))))
