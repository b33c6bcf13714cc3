// Building elements. Data only ever becomes text: nothing here parses markup.

/**
 * Make an element.
 *
 * @param {string} tag
 * @param {Object} [props] `class`, `text`, `onclick` and the like; everything else is an attribute
 *     (true: present without a value; false, null: absent).
 * @param {...(Node|string)} children
 * @returns {HTMLElement}
 */
export function h(tag, props = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (name === "text") element.textContent = value;
    else if (name === "class") element.className = value;
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else setAttribute(element, name, value);
  }
  element.append(...children);
  return element;
}

/** Set an attribute if it differs; true: present without a value, false and null: absent. */
export function setAttribute(element, name, value) {
  if (value === false || value == null) element.removeAttribute(name);
  else {
    const text = value === true ? "" : String(value);
    if (element.getAttribute(name) !== text) element.setAttribute(name, text);
  }
}

/** Set the text if it differs, so that a selection and the reader's place survive an update. */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/**
 * A description list whose values can be updated.
 *
 * @returns {{element: HTMLElement, update: function(Array<[string, string]>): void}}
 */
export function facts(className = "facts") {
  const element = h("dl", { class: className });
  const values = new Map();
  let names = "";
  return {
    element,
    update(pairs) {
      const now = JSON.stringify(pairs.map(([name]) => name));
      if (now !== names) {
        names = now;
        values.clear();
        element.replaceChildren(
          ...pairs.map(([name]) => {
            const value = h("dd");
            values.set(name, value);
            return h("div", {}, h("dt", { text: name }), value);
          }),
        );
      }
      for (const [name, value] of pairs) setText(values.get(name), value);
    },
  };
}

/**
 * Make the children of a parent exactly these nodes, in this order, moving as little as possible.
 * A focused element keeps the focus also where moving it takes it away.
 */
export function setChildren(parent, nodes) {
  const focused = parent.contains(document.activeElement) ? document.activeElement : null;
  const wanted = new Set(nodes);
  for (const child of [...parent.children]) if (!wanted.has(child)) child.remove();
  let place = parent.firstElementChild;
  for (const node of nodes) {
    if (node === place) place = place.nextElementSibling;
    else parent.insertBefore(node, place);
  }
  if (focused && document.activeElement !== focused && parent.contains(focused)) {
    focused.focus({ preventScroll: true });
  }
}
