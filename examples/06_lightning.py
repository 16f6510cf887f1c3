"""LoRA in Lightning: the module is yours, attach is one line before the optimiser is made.

pip install lightning
python examples/06_lightning.py [FOLDER]
"""

import logging
import sys
import warnings

import lightning
import torch
from torch import nn

import thimble

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="lightning")


class Sums(lightning.LightningModule):
    """Learns sums of its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 64), nn.BatchNorm1d(64), nn.GELU(), nn.Linear(64, 1))
        self.losses: list[float] = []

    def training_step(self, batch: list[torch.Tensor], number: int) -> torch.Tensor:
        loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], 1e-2)


lightning.seed_everything(0, verbose=False)
inputs = torch.randn(512, 8)
data = torch.utils.data.TensorDataset(inputs, inputs.sum(1, keepdim=True))
module = Sums()
print(thimble.attach(module.net, rank=4, train_also=["3"]))

trainer = lightning.Trainer(
    max_epochs=5, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
    enable_model_summary=False,
)  # fmt: skip
trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=32, shuffle=True))
print(f"loss {module.losses[0]:.3f} at first, {module.losses[-1]:.3f} at last")
thimble.save_adapter(thimble.adapter_of(module), (sys.argv[1:] or ["lightning_adapter"])[0])
