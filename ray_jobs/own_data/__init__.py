"""Training on a folder of one's own videos without a recipe: `ca2st train --data-folder DIR`."""
