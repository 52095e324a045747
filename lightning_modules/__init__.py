"""One LightningModule per training method."""
