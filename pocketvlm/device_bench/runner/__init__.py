"""What runs on the device: one job, measured stage by stage, with the sensors there."""
