"""A session of aiobotocore that makes each request once."""

from __future__ import annotations

from typing import Any

from aiobotocore.httpsession import AIOHTTPSession


class OneTrySession(AIOHTTPSession):  # type: ignore[misc]
    """Leaves trying again to the caller, who counts."""

    async def _get_session(self, proxy_url: Any) -> Any:
        session = await super()._get_session(proxy_url)
        session._retry_connection = False  # it repeats a request whose connection was lost, and tells nobody
        return session
