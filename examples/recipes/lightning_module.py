"""An adapted model in a Lightning module, with checkpoints that leave the base out. See docs/recipes.md."""

import argparse

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lora_lite as ll

parser = argparse.ArgumentParser()
parser.add_argument("--variant", default="pissa")
parser.add_argument("--out", default="lightning-run")
args = parser.parse_args()


def base():  # stands for your pretrained model
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))


class Adapted(lightning.LightningModule):
    def __init__(self, model, cfg):
        super().__init__()
        self.model = model
        ll.attach(model, cfg)

    def training_step(self, batch, _):
        x, y = batch
        loss = nn.functional.cross_entropy(self.model(x), y)
        self.log("loss", loss, prog_bar=True)
        return loss + ll.penalty(self.model)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(ll.param_groups(self.model, lr=1e-2, weight_decay=0.01))
        ll.follow(self.model, optimizer)
        return optimizer

    def frozen(self):
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        return [name for name in self.state_dict() if "lora_" not in name and name not in trained]

    def on_save_checkpoint(self, checkpoint):
        for name in self.frozen():
            del checkpoint["state_dict"][name]

    def on_load_checkpoint(self, checkpoint):  # so that loading stays strict
        own = self.state_dict()
        checkpoint["state_dict"] |= {name: own[name] for name in self.frozen()}


torch.manual_seed(1)
x = torch.randn(256, 32)  # stands for your data
batches = DataLoader(TensorDataset(x, x[:, :4].argmax(1)), batch_size=32)


def trained(epochs, resume=None):
    module = Adapted(base(), ll.LoraLiteConfig(variant=args.variant, target_names=("0", "2"), r=4))
    trainer = lightning.Trainer(max_epochs=epochs, logger=False, enable_checkpointing=False)
    trainer.fit(module, batches, ckpt_path=resume)
    trainer.save_checkpoint(f"{args.out}/epoch-{epochs}.ckpt")
    return module.model.to("cpu").eval(), trainer.callback_metrics["loss"]


_, first = trained(2)
model, last = trained(4, resume=f"{args.out}/epoch-2.ckpt")
assert last < first, (first, last)
ll.save(model, f"{args.out}/adapter.safetensors")

again = base()
print(ll.load(again, f"{args.out}/adapter.safetensors"))
torch.testing.assert_close(again(x), model(x))
