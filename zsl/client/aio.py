"""`AsyncTrunkClient`: forward and backward of a remote trunk as coroutines."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import torch

from zsl.client.replayable_step import Answer, CallAdapter, HeldCache, Step, read_answer
from zsl.client.trunk_client import CONNECT_TIMEOUT_SECONDS, REQUEST_TIMEOUT_SECONDS, TrunkClient
from zsl.link.traffic import Traffic
from zsl.wire.messages import AdapterSum, Cut, FloatDtypeName, ModelIdentity, Reveal, Status, Welcome


class AsyncTrunkClient:
    """Asyncio client of a trunk daemon; see `TrunkClient` for arguments and errors.

    async with AsyncTrunkClient("tcp://127.0.0.1:5555") as trunk:
        step = await trunk.forward(activations, keep=True)
        answer = await trunk.backward(step, gradients)
    """

    def __init__(
        self,
        endpoint: str,
        *,
        server_key: str | None = None,
        client_key: str | Path | None = None,
        model: ModelIdentity | None = None,
        cut: Cut | None = None,
        dtype: FloatDtypeName = "f32",
        connect_timeout_seconds: float = CONNECT_TIMEOUT_SECONDS,
        request_timeout_seconds: float = REQUEST_TIMEOUT_SECONDS,
    ) -> None:
        self._client = TrunkClient(
            endpoint,
            server_key=server_key,
            client_key=client_key,
            model=model,
            cut=cut,
            dtype=dtype,
            connect_timeout_seconds=connect_timeout_seconds,
            request_timeout_seconds=request_timeout_seconds,
        )

    @property
    def endpoint(self) -> str:
        return self._client.endpoint

    @property
    def welcome(self) -> Welcome:
        """WELCOME of the session: model, cut, limits. Raises `ClosedError` before `connect`."""
        return self._client.welcome

    @property
    def replays(self) -> int:
        """Number of requests sent again because a connection or a daemon was lost."""
        return self._client.replays

    @property
    def traffic(self) -> Traffic:
        """Bytes, answers, and the daemon's seconds so far."""
        return self._client.traffic

    async def connect(self) -> Welcome:
        """Open a session, unless one is open."""
        return await asyncio.to_thread(self._client.connect)

    async def forward(
        self,
        activations: torch.Tensor,
        *,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        lengths: torch.Tensor | None = None,
        keep: bool = False,
        adapter: CallAdapter | None = None,
        reveal: Sequence[Reveal] = (),
        cache: HeldCache | None = None,
        rows: list[int] | None = None,
    ) -> Step:
        """Run the trunk on activations `[rows, tokens, hidden]`."""
        step, future = self._client.submit_forward(
            activations,
            attention_mask=attention_mask,
            position_ids=position_ids,
            lengths=lengths,
            keep=keep,
            adapter=adapter,
            reveal=reveal,
            cache=cache,
            rows=rows,
        )
        self._client.finish_forward(step, await asyncio.wrap_future(future), cache)
        return step

    def new_cache(self) -> HeldCache:
        """Return an empty cache for `forward`."""
        return self._client.new_cache()

    def has(self, cache: HeldCache) -> bool:
        """Return whether a cache is on this connection."""
        return self._client.has(cache)

    async def backward(
        self,
        step: Step,
        gradients: torch.Tensor,
        *,
        activations: torch.Tensor | None = None,
        adapter_gradients: bool = False,
        adapter_sum: AdapterSum | None = None,
        at_revealed: Mapping[Reveal, torch.Tensor] | None = None,
    ) -> Answer:
        """Return the gradient at the trunk's input, `[rows, tokens, hidden]`."""
        future = self._client.submit_backward(
            step,
            gradients,
            activations=activations,
            adapter_gradients=adapter_gradients,
            adapter_sum=adapter_sum,
            at_revealed=at_revealed,
        )
        return read_answer(await asyncio.wrap_future(future), "gradients", adapter_gradients=adapter_gradients)

    async def status(self) -> Status:
        """Return the model that the daemon serves, and its load."""
        return await asyncio.to_thread(self._client.status)

    async def weight_norms(self, paths: Sequence[str]) -> list[torch.Tensor]:
        """Return the norms `[out]` of the rows of the weights of linear modules in the trunk."""
        return await asyncio.to_thread(self._client.weight_norms, paths)

    async def close(self) -> None:
        """End the session."""
        await asyncio.to_thread(self._client.close)

    async def __aenter__(self) -> Self:
        try:
            await self.connect()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()
