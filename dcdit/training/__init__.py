"""The LightningModule, the ratio loss and the drop fraction of a step, callbacks, and a run in phases."""
