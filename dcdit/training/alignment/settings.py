"""What a user may say about alignment. No torch here, so that mistakes show at once."""

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from dcdit.checks import Bounds, Grid, NamedSettings, NonNegative, Positive, Size, Table, config
from dcdit.errors import UserError

if TYPE_CHECKING:
    from dcdit.data.manifest import Manifest
    from dcdit.network import Network
    from dcdit.training.alignment.losses import Alignment

FeatureSource = Literal["computed", "stored"]
"""Features of an encoder: computed in training, or stored beside the latents."""

Block = Annotated[int, Bounds(1, 1000, hint="it is the number of a block, or auto")]


class AlignmentSettings(NamedSettings):
    """What the hidden states of the network are aligned with.

    Attributes:
        name: its name in :data:`ALIGNMENTS`.
        implementation: what :meth:`build` calls.
    """

    @property
    def feature_source(self) -> FeatureSource | None:
        """Where the features of an encoder come from; None where none are needed."""
        return None

    def check_network(self, network: "Network") -> None:
        """Raise :class:`UserError` unless the hidden states of ``network`` can be aligned so."""

    def build(self, network: "Network", manifest: "Manifest | None") -> "Alignment | None":
        """The loss; None for no loss.

        Args:
            network: that is trained.
            manifest: of the latents that it is trained on; None for a trial without data, which takes the same memory.

        Raises:
            UserError: if the shards do not fit it, or the encoder cannot be had.
        """
        alignment: Alignment | None = self.call_implementation(network, manifest)
        return alignment


@config
class NoAlignment(AlignmentSettings):
    """Hidden states that are not aligned with anything."""

    name: ClassVar[str] = "none"
    implementation: ClassVar[str] = "dcdit.training.alignment.build:build_nothing"


@config
class BlockSettings(AlignmentSettings):
    """Alignment of the tokens after one block."""

    block: Literal["auto"] | Block
    weight: NonNegative

    def block_of(self, depth: int) -> int:
        """The number of the block that ``auto`` stands for in a network of this depth."""
        raise NotImplementedError

    def check_network(self, network: "Network") -> None:
        """Raise :class:`UserError` unless ``network`` has the block."""
        from dcdit.network.blocks import blocks_of

        depth = len(blocks_of(network))
        if not depth:
            raise UserError(
                f"alignment={self.name}: {network.title} has no blocks of dcdit.network.blocks.DiTBlock to align, take"
                " alignment=none"
            )
        if self.block_of(depth) > depth:
            raise UserError(f"alignment.block={self.block}: the network has {depth} blocks, take one of them")


@config
class EncoderSettings(BlockSettings):
    """Alignment with the patch features of a pretrained encoder."""

    encoder: str
    weights: str
    grid: Grid
    features: FeatureSource

    @property
    def feature_source(self) -> FeatureSource:
        """Where the features come from, as the key ``features`` says."""
        return self.features

    def block_of(self, depth: int) -> int:
        """The number of the block: 8 for the scales L and XL and 4 for S and B, as REPA has them; a third of others."""
        if self.block != "auto":
            return self.block
        return 8 if depth >= 24 else max(1, depth // 3)

    def check_network(self, network: "Network") -> None:
        """Raise :class:`UserError` unless ``network`` has the block, and each of its tokens lies in one patch."""
        super().check_network(network)
        side = network.token_grid[0]
        if side % self.grid:
            fitting = [number for number in range(1, side + 1) if side % number == 0]
            raise UserError(
                f"alignment.grid={self.grid}: patches of the encoder must cover the {side} x {side} tokens of"
                f" {network.title} evenly, take one of {', '.join(map(str, fitting))}"
            )


@config
class REPA(EncoderSettings):
    """Alignment of each token with the patch that covers it (REPA, arXiv 2410.06940)."""

    name: ClassVar[str] = "repa"
    implementation: ClassVar[str] = "dcdit.training.alignment.build:build_repa"
    width: Size


@config
class IREPA(EncoderSettings):
    """Alignment of tokens on the grid with normalised features (iREPA, arXiv 2512.10794)."""

    name: ClassVar[str] = "irepa"
    implementation: ClassVar[str] = "dcdit.training.alignment.build:build_irepa"

    def __post_init__(self) -> None:
        if self.grid == 1:
            raise UserError(
                "alignment.grid=1: iREPA normalises features over the patches of an image, and of one patch nothing is"
                " left: take more patches, or alignment=repa"
            )


@config
class Dispersive(BlockSettings):
    """Samples of a batch repel one another; no encoder is needed (dispersive loss, arXiv 2506.09027)."""

    name: ClassVar[str] = "dispersive"
    implementation: ClassVar[str] = "dcdit.training.alignment.build:build_dispersive"
    temperature: Positive

    def block_of(self, depth: int) -> int:
        """The number of the block: that at a quarter of the depth."""
        return max(1, depth // 4) if self.block == "auto" else self.block


ALIGNMENTS: Table[type[AlignmentSettings]] = Table(
    "alignment.name", {kind.name: kind for kind in (NoAlignment, REPA, IREPA, Dispersive)}
)
"""What hidden states may be aligned with, by ``alignment.name``."""
