"""Activation checkpointing: a layer is computed again for its gradients, with the same numbers and much less kept."""

import pytest
import torch

from support.models import JOINED_KINDS, inputs_for, tiny_model, wake

DEPTH = 8


def _model(kind, *, checkpointing):
    model = tiny_model(kind, depth=DEPTH, drop_path_rate=0.5)
    wake(model)
    model.activation_checkpointing = checkpointing
    return model.train()


def _train_once(model):
    """Loss and gradients of one forward and backward pass, and the bytes that lay ready for the latter."""
    torch.manual_seed(7)
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address is used twice
        return tensor

    def keep_inputs(_layer, arguments):
        for tensor in arguments[0].values():  # what a checkpoint holds on to
            keep(tensor)

    handles = [layer.register_forward_pre_hook(keep_inputs) for layer in model.layers]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(*inputs_for(batch=4)).logits["label"].square().sum()
    num_bytes = sum(size for size, _ in kept.values())
    for handle in handles:
        handle.remove()
    kept.clear()
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, num_bytes


@pytest.mark.parametrize("kind", JOINED_KINDS)
def test_losses_and_gradients_are_bit_equal_and_less_than_half_the_bytes_are_kept(kind):
    loss, gradients, num_bytes = _train_once(_model(kind, checkpointing=False))
    loss_again, gradients_again, num_bytes_again = _train_once(_model(kind, checkpointing=True))
    assert loss_again == loss
    assert gradients_again.keys() == gradients.keys()
    assert all(torch.equal(gradients_again[name], gradient) for name, gradient in gradients.items())
    assert num_bytes_again < num_bytes / 2


def test_drop_path_draws_and_drops_clips_in_that_test():
    model = _model("cast", checkpointing=True)
    torch.manual_seed(7)
    first = model(*inputs_for(batch=4)).logits["label"]
    torch.manual_seed(8)
    assert not torch.equal(model(*inputs_for(batch=4)).logits["label"], first)


def test_no_layer_is_computed_again_in_evaluation():
    model = _model("cast", checkpointing=True).eval()
    calls = []
    handle = model.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    model(*inputs_for()).logits["label"].sum().backward()
    handle.remove()
    assert len(calls) == 1
