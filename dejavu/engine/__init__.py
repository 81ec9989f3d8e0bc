"""The serving engine: controller, scheduler, worker."""
