"""The small world: scenes of pictograms with exact truth, and the recipe of the model that ships."""
