"""An aiobotocore session that makes each request once."""

from typing import Any

from aiobotocore.httpsession import AIOHTTPSession


class NoRetrySession(AIOHTTPSession):  # type: ignore[misc]
    """Leaves retries to the caller, who counts them."""

    async def _get_session(self, proxy_url: Any) -> Any:
        session = await super()._get_session(proxy_url)
        session._retry_connection = False  # by default aiohttp repeats a request whose connection was lost
        return session
