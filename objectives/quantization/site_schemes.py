"""The schemes of a model site by site: one for all, and others for the sites that are named."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.quantization.scheme import Scheme


@dataclass(frozen=True)
class SiteSchemes:
    """The scheme of every site. Operators that read one tensor (q, k, v; gate and up) are one site, so they share theirs.

    Attributes:
        default: Of every site that is not named.
        others: (site, scheme) of those that are, by name; none of them is the default.
    """

    default: Scheme
    others: tuple[tuple[str, Scheme], ...] = ()

    @classmethod
    def build(cls, default: Scheme, others: Mapping[str, Scheme]) -> SiteSchemes:
        """One scheme for all sites but those that are named.

        Args:
            default: Scheme of the rest.
            others: Site -> its scheme; those equal to the default change nothing.
        """
        return cls(default, tuple(sorted((site, s) for site, s in others.items() if s != default)))

    @classmethod
    def given(cls, schemes: Scheme | SiteSchemes) -> SiteSchemes:
        """The same; a scheme alone is that of every site."""
        return cls(schemes) if isinstance(schemes, Scheme) else schemes

    def of(self, site: str) -> Scheme:
        """The scheme of a site.

        Args:
            site: Its name.
        """
        return dict(self.others).get(site, self.default)

    def changed(self, others: Mapping[str, Scheme]) -> SiteSchemes:
        """The same with other schemes at some sites.

        Args:
            others: Site -> its scheme.
        """
        return self.build(self.default, {**dict(self.others), **others})

    def require_sites(self, sites: Iterable[str]) -> None:
        """Require that every site that is named exists.

        Raises:
            InputError: One does not.
        """
        known = set(sites)
        for site, _ in self.others:
            if site not in known:
                raise InputError("schemes", f"no site is named {site!r}", "use the names of the discovered sites")

    @property
    def static(self) -> bool:
        """Whether the activations of any site are quantized with scales fixed by calibration."""
        return any(scheme.static for scheme in self.used)

    @property
    def used(self) -> tuple[Scheme, ...]:
        """Every scheme once: the default, then the others in the order of the sites."""
        return tuple(dict.fromkeys((self.default, *(scheme for _, scheme in self.others))))

    @property
    def name(self) -> str:
        """The default's name, and how many sites have another scheme, e.g. ``w8a8-channel-static+4``."""
        return f"{self.default.name}+{len(self.others)}" if self.others else self.default.name
