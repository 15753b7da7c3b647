"""The deployments that serve a model: targets, their keys, and the model's name there; which one a call goes to."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Final, NamedTuple
from urllib.parse import unquote

import msgspec

from forebay.errors import ForebayError
from forebay.gateway.callers.issued_keys import IssuedKey
from forebay.gateway.error_responses import ApiProtocol
from forebay.gateway.settings import ModelSettings
from forebay.gateway.targets.provider_key import ProviderKey
from forebay.gateway.targets.targets import Destination, Target
from forebay.upstream import Fallback
from forebay.upstream.call_flow import CallRunner
from forebay.upstream.call_request import Prospect
from forebay.upstream.fallbacks.even_draws import EvenDraws
from forebay.upstream.fallbacks.fallback_routes import FallbackResolver
from forebay.upstream.fallbacks.load_balancer import choose_by_room
from forebay.upstream.providers.json_text import replace_lone_surrogates
from forebay.upstream.stored_responses import StoredResponses

_CACHED: Final = 1_000  # names of models whose deployments are kept
_CACHED_PARTS: Final = 100  # combinations of targets to which keys are limited
_DEPLOYMENT: Final = re.compile(r"/deployments/([^/?#]+)/", re.IGNORECASE)  # Azure names the model in the path
_RESPONSE: Final = re.compile(r"/responses/([^/]+)")
_SPECIAL: Final = re.compile(r"([*?\[])")


class _Fields(msgspec.Struct):
    """The fields of a request's body that say where it goes."""

    model: str | None = None
    previous_response_id: str | None = None
    conversation: msgspec.Raw = msgspec.Raw(b"null")


_decoder: Final = msgspec.json.Decoder(_Fields)


class RequestedModel(NamedTuple):
    """The model of a request, and what binds it to one deployment.

    Attributes:
        model: that it names, in its JSON body or in its path; None if it names none.
        response_id: of the stored response that it continues or fetches, or None.
        stored: it depends on what its provider stores under one API key.
    """

    model: str | None = None
    response_id: str | None = None
    stored: bool = False


def read_requested_model(path: str, body: bytes) -> RequestedModel:
    """Return what a request says about the deployment that it goes to."""
    resource = path.partition("?")[0]
    if found := _RESPONSE.search(resource):
        return RequestedModel(response_id=found[1], stored=True)
    fields = _Fields()
    if body.lstrip()[:1] == b"{":
        try:
            fields = _decoder.decode(replace_lone_surrogates(body))
        except (msgspec.MsgspecError, ValueError, RecursionError):
            return RequestedModel()  # what is wrong with it is said later
    found = _DEPLOYMENT.search(resource)  # which counts, where the body names another one
    model = fields.model if found is None else unquote(found[1])
    stored = fields.previous_response_id is not None or bytes(fields.conversation) != b"null"
    return RequestedModel(model, fields.previous_response_id, stored)


class StoredPlace(NamedTuple):
    """The place where a response is stored.

    Attributes:
        target: name of the target that has made it.
        key: the key of the gateway under which it was made; empty if it was made with none.
    """

    target: str
    key: str

    def __repr__(self) -> str:
        return f"StoredPlace({self.target!r})"


class Deployment(NamedTuple):
    """One place that serves a model.

    Attributes:
        target: the provider.
        model: the model's name there; None for the name that the call has.
        key: that the gateway holds for the target; None if it holds none.
        weight: share of calls while several deployments have room.
    """

    target: Target
    model: str | None
    key: ProviderKey | None
    weight: float

    @property
    def place(self) -> StoredPlace:
        """The place where its responses are stored."""
        return StoredPlace(self.target.name, "" if self.key is None else self.key.key)

    def as_peer(self, own_model: str, called: str, *, takes_own_key: bool) -> Fallback:
        """Return the way to it for calls that were prepared for another deployment of the same pool.

        Args:
            own_model: the model's name at that other deployment.
            called: the name that the caller used.
            takes_own_key: calls are sent with the API keys of their callers, which are for this target.
        """
        models = _SPECIAL.sub(r"[\1]", own_model)  # named, so that the operator's word counts for embeddings too
        model = self.model or called
        if takes_own_key:
            return Fallback(model, weight=self.weight, models=models)
        return Fallback(
            self.target.upstream,
            weight=self.weight,
            models=models,
            model=model,
            base_url=self.target.sdk_url,
            api_key=None if self.key is None else self.key.key,
        )


class ChosenDeployment(NamedTuple):
    """The deployment that a call is prepared for, and what runs it.

    Attributes:
        deployment: the deployment.
        called: the name that the caller used; None if the call names no model.
        model: the model's name there.
        runner: runs the call, at other deployments too.
        takes_own_key: the call is sent with the API key of its caller.
    """

    deployment: Deployment
    called: str | None
    model: str | None
    runner: CallRunner
    takes_own_key: bool


class _Choices(NamedTuple):
    """The deployments that a call of one model can go to, and the draws by which calls are shared among them."""

    deployments: tuple[ChosenDeployment, ...]
    draw: EvenDraws


class DeploymentPool:
    """The deployments that share the calls of a model. Of a plain alias there is one.

    Args:
        deployments: at least one.
        takes_own_key: calls may be sent with the API keys of their callers.

    Attributes:
        deployments: as given.
        targets: the names of their targets.
    """

    def __init__(self, deployments: Sequence[Deployment], *, takes_own_key: bool = True) -> None:
        self.deployments = tuple(deployments)
        self.targets = frozenset(deployment.target.name for deployment in self.deployments)
        one_target = len(self.targets) == 1
        own = one_target and self.deployments[0].key is None  # which is for one provider only
        self._takes_own_key = takes_own_key and own
        self._choices = functools.lru_cache(_CACHED)(self._choices_for)
        self._parts = functools.lru_cache(_CACHED_PARTS)(self._part_of)

    def allowed_to(self, key: IssuedKey | None) -> DeploymentPool:
        """Return the deployments that an issued key may use, as a pool: those of its targets, by the same weights.

        Raises:
            TargetNotAllowed: it may use none.
        """
        if key is None:
            return self
        allowed = frozenset(name for name in self.targets if key.allows_target(name))
        if not allowed:
            names = ", ".join(map(repr, sorted(self.targets)))
            raise TargetNotAllowed(targets=f"the target {names}" if len(self.targets) == 1 else f"the targets {names}")
        return self if allowed == self.targets else self._parts(allowed)

    def _part_of(self, targets: frozenset[str]) -> DeploymentPool:
        deployments = [each for each in self.deployments if each.target.name in targets]
        return DeploymentPool(deployments, takes_own_key=self._takes_own_key)

    @property
    def protocol(self) -> ApiProtocol:
        """The protocol of its targets."""
        return self.deployments[0].target.protocol

    def choose(self, request: RequestedModel, place: StoredPlace | None) -> ChosenDeployment:
        """Return the deployment that a call goes to first: that which would send a typical one soonest.

        A call that depends on what is stored under a key goes there. Where that is not known, the first deployment
        serves all of these, and so it does for calls without a model.

        Args:
            request: what the call says.
            place: where the response that it continues or fetches is stored, if that is known.
        """
        choices, draw = self._choices(request.model)
        if place is not None:
            return next((choice for choice in choices if choice.deployment.place == place), choices[0])
        if request.model is None or request.stored or len(choices) == 1:
            return choices[0]
        options = [(_prospect(choice), choice.deployment.weight) for choice in choices]
        return choices[choose_by_room(options, draw())]

    def _choices_for(self, model: str | None) -> _Choices:
        choices = []
        for own in self.deployments:
            named = None if model is None else own.model or model
            peers = (
                [
                    other.as_peer(named, model, takes_own_key=self._takes_own_key)
                    for other in self.deployments
                    if other is not own
                ]
                if model is not None and named is not None
                else []
            )
            resolver = FallbackResolver(own.target.upstream, peers, own_weight=own.weight, drawn=True)
            runner = CallRunner(own.target.upstream.core, resolver)
            choices.append(ChosenDeployment(own, model, named, runner, self._takes_own_key))
        return _Choices(tuple(choices), EvenDraws())


def _prospect(choice: ChosenDeployment) -> Prospect:
    """Return what a typical call can expect of a deployment."""
    deployment = choice.deployment
    credential = "" if deployment.key is None else deployment.key.key
    account = deployment.target.upstream.core.accounts.account(choice.model or "", credential)
    return account.prospect_for()


class WrongProtocol(ForebayError, ValueError):
    """The model {model!r} is served by an API of the protocol {protocol!r}: call it by a path and an SDK of that."""


class TargetNotAllowed(ForebayError, ValueError):
    """This API key is not for {targets}, which is where this model is served: ask who runs this gateway."""


class ModelDirectory:
    """The models that callers can name at a gateway, and the deployments that serve them.

    Args:
        models: the aliases.
        targets: of the gateway.

    Attributes:
        aliases: the names by which callers use models, patterns left out, in the order of the settings, each with the
            protocol by which it is called, or None for either.
        responses: where responses are stored, by id.
    """

    def __init__(self, models: Sequence[ModelSettings], targets: Sequence[Target]) -> None:
        by_name = {target.name: target for target in targets}
        self._by_target = {target.name: DeploymentPool(_deployments(target, None, 1.0)) for target in targets}
        self._pools: dict[tuple[str, str], DeploymentPool] = {}  # by alias and, if it names no target, by target
        self.responses: StoredResponses[StoredPlace] = StoredResponses()
        self._exact: dict[str, ModelSettings] = {}
        self._patterns: list[ModelSettings] = []
        self.aliases: dict[str, ApiProtocol | None] = {}
        for alias in models:
            if alias.is_pattern:
                self._patterns.append(alias)
            else:
                self._exact[alias.name] = alias
            for each in [""] if alias.deployments[0].target is not None else by_name:
                deployments = [
                    deployment
                    for place in alias.deployments
                    for deployment in _deployments(by_name[place.target or each], place.model, place.weight)
                ]
                self._pools[alias.name, each] = DeploymentPool(deployments)
            if not alias.is_pattern:
                self.aliases[alias.name] = (
                    None if (alias.name, "") not in self._pools else self._pools[alias.name, ""].protocol
                )
        self._patterns.sort(key=lambda alias: len(alias.name), reverse=True)

    def serves(self, alias: str, key: IssuedKey) -> bool:
        """Return whether an alias, which is no pattern, has a deployment at a target that an issued key may use."""
        pool = self._pools.get((alias, ""))
        return pool is None or any(map(key.allows_target, pool.targets))

    def find_alias(self, model: str | None) -> ModelSettings | None:
        """Return the alias that a name stands for: the longest pattern that matches counts; None if it is none."""
        if model is None:
            return None
        if (alias := self._exact.get(model)) is not None:
            return alias
        return next((alias for alias in self._patterns if fnmatchcase(model, alias.name)), None)

    def record_stored(self, response_id: str, target: str, key: ProviderKey | None) -> None:
        """Note where a response is stored; see `IncomingRequest.on_stored`."""
        self.responses.add(response_id, StoredPlace(target, "" if key is None else key.key))

    def find(self, destination: Destination, body: bytes) -> ChosenDeployment | None:
        """Return the deployment that a request goes to; None if it goes as it is to the target of its path.

        With an issued key it goes to one of those at targets that the key may use.

        Args:
            destination: by the path of the request. Below the name of a target, models have that target's names.
            body: of the request.

        Raises:
            WrongProtocol: the model is called by the protocol of another API.
            TargetNotAllowed: the issued key of the caller may use none of the targets that serve the model.
        """
        target = destination.target
        aliased = not destination.by_name and bool(self._exact or self._patterns)
        if not aliased and not target.keys:
            return None
        request = read_requested_model(destination.path, body)
        alias = self.find_alias(request.model) if aliased else None
        place = self.responses.get(request.response_id)
        fetched = request.model is None and not destination.by_name
        if fetched and place is not None and place.key:  # a caller's own key is for the target of its path only
            return self._by_target[place.target].allowed_to(destination.key).choose(request, place)
        if alias is None and not target.keys:
            return None
        pool = self._pool(alias, target)
        if pool.protocol != target.protocol:
            raise WrongProtocol(model=request.model, protocol=pool.protocol)
        return pool.allowed_to(destination.key).choose(request, place)

    def _pool(self, alias: ModelSettings | None, target: Target) -> DeploymentPool:
        if alias is None:
            return self._by_target[target.name]
        return self._pools.get((alias.name, "")) or self._pools[alias.name, target.name]


def _deployments(target: Target, model: str | None, weight: float) -> list[Deployment]:
    """Return the deployments of a model at a target: one for each key that the gateway holds for it."""
    if not target.keys:
        return [Deployment(target, model, None, weight)]
    return [Deployment(target, model, key, weight * key.weight) for key in target.keys]
