"""From a reference to something to talk to: credentials found, transport made, repository opened."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from modelforge.registry import credentials
from modelforge.registry.client import Client
from modelforge.registry.limits import Limits
from modelforge.registry.reference import LayoutReference, Reference
from modelforge.registry.source import LayoutSource, RegistrySource, Source
from modelforge.registry.transport import Transport


@dataclass(frozen=True)
class Connection:
    """How to reach registries: what the command line says of it."""

    plain_http: bool = False
    ca_file: Path | None = None
    limits: Limits = field(default_factory=Limits)

    def client(self, reference: Reference, *, writing: bool = False) -> Client:
        """One repository, with the user's credentials for it.

        Raises:
            InputError: a credential file or helper cannot be used. RegistryError: the registry cannot be reached.
        """
        return Client(self._transport(reference), reference.repository, writing=writing)

    def source(self, reference: Reference | LayoutReference) -> Source:
        if isinstance(reference, LayoutReference):
            return LayoutSource(reference)
        return RegistrySource(self.client(reference), reference)

    def check_login(self, host: str, login: credentials.Login) -> None:
        """Ask a registry whether it takes these credentials.

        Raises:
            RegistryError: it does not, or cannot be reached.
        """
        Transport(host, login=login, plain_http=self.plain_http, ca_file=self.ca_file, limits=self.limits).ask(
            "GET", "/v2/"
        )

    def _transport(self, reference: Reference) -> Transport:
        login = credentials.find(reference.name)
        return Transport(
            reference.host, login=login, plain_http=self.plain_http, ca_file=self.ca_file, limits=self.limits
        )
