// Labels as chips: Enter, a comma or a semicolon ends a label; Backspace in an empty field takes the last one away.

export function chipField(box, list, input, changed) {
  let labels = [];

  function show() {
    list.replaceChildren(...labels.map((label) => {
      const item = document.createElement("li"), swatch = document.createElement("i"), remove = document.createElement("button");
      swatch.className = "swatch";
      swatch.dataset.label = label;
      remove.type = "button";
      remove.textContent = "×";
      remove.setAttribute("aria-label", `Remove ${label}`);
      remove.onclick = () => {
        set(labels.filter((other) => other !== label));
        input.focus();
      };
      item.append(swatch, label, remove); // as text: a label may hold anything
      return item;
    }));
    changed();
  }
  function set(wanted) {
    labels = [...new Set(wanted.map((label) => label.replace(/\s+/g, " ").trim()).filter(Boolean))];
    show();
  }
  function take() { // what is typed but not yet a chip
    const typed = input.value;
    input.value = "";
    if (typed.trim()) set([...labels, ...typed.split(/[;,\n]/)]);
  }

  input.addEventListener("keydown", (event) => {
    if (event.isComposing || event.ctrlKey || event.metaKey) return;
    if (["Enter", ",", ";"].includes(event.key) && input.value.trim()) {
      event.preventDefault();
      take();
    } else if ([",", ";"].includes(event.key)) {
      event.preventDefault();
    } else if (event.key === "Backspace" && !input.value && labels.length) {
      set(labels.slice(0, -1));
    }
  });
  input.addEventListener("input", () => (/[;,\n]/.test(input.value) ? take() : changed())); // pasted, or by a telephone's keyboard
  input.addEventListener("blur", take);
  box.addEventListener("click", (event) => event.target === box && input.focus());
  return { set, take, labels: () => [...labels, ...input.value.split(/[;,\n]/).map((x) => x.trim()).filter(Boolean)] };
}
