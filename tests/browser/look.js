// What a reader could not read in the outputs of a notebook: text of too little contrast, and what is wider than its
// cell. Colours are computed, and grounds blended from the innermost outward, gradients by their darkest and lightest.
() => {
  const parse = text => {
    const found = text.match(/rgba?\(([^)]+)\)/);
    if (!found) return null;
    const [r, g, b, a = 1] = found[1].split(/[ ,/]+/).map(Number);
    return { r, g, b, a };
  };
  const over = (top, bottom) => ({
    r: top.r * top.a + bottom.r * (1 - top.a),
    g: top.g * top.a + bottom.g * (1 - top.a),
    b: top.b * top.a + bottom.b * (1 - top.a),
    a: 1,
  });
  const luminance = ({ r, g, b }) => {
    const [x, y, z] = [r, g, b].map(v => v / 255).map(v => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const contrast = (a, b) => {
    const [high, low] = [luminance(a), luminance(b)].sort((x, y) => y - x);
    return (high + 0.05) / (low + 0.05);
  };
  // All grounds that may lie behind an element: one, or several where a gradient is among them.
  const grounds = element => {
    let layers = [];
    for (let at = element; at; at = at.parentElement) {
      const style = getComputedStyle(at);
      const own = parse(style.backgroundColor);
      const gradient = (style.backgroundImage.match(/rgba?\([^)]+\)/g) || []).map(parse);
      if (gradient.length) layers.push([{ r: 0, g: 0, b: 0, a: 0 }, ...gradient]);
      if (own && own.a > 0) layers.push([own]);
      if (own && own.a === 1) break;
    }
    let found = [{ r: 255, g: 255, b: 255, a: 1 }];
    for (const choices of layers.reverse()) found = found.flatMap(base => choices.map(one => over(one, base)));
    return found;
  };
  const SCROLLED = "div[style*='overflow-x'], pre, .nbm-table"; // what has a scroll bar of its own
  const faint = [], wide = [];
  let texts = 0;
  for (const output of document.querySelectorAll(".jp-OutputArea-output")) {
    const room = output.getBoundingClientRect();
    const walker = document.createTreeWalker(output, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
      const text = walker.currentNode.textContent.trim(), element = walker.currentNode.parentElement;
      if (!text || ["STYLE", "SCRIPT"].includes(element.tagName)) continue;
      if (!element.getClientRects().length) continue; // folded away
      texts += 1;
      const ink = parse(getComputedStyle(element).color);
      for (const ground of grounds(element)) {
        const found = contrast(over(ink, ground), ground);
        if (found < 4.5) faint.push(`${found.toFixed(2)}: ${text.slice(0, 60)}`);
      }
      const box = element.getBoundingClientRect();
      if (!element.closest(SCROLLED) && box.right > room.right + 1) wide.push(text.slice(0, 60));
    }
    for (const frame of output.querySelectorAll("div, input, select, button")) {
      if (!frame.parentElement.closest(SCROLLED) && frame.getBoundingClientRect().right > room.right + 1) wide.push(`<${frame.tagName} ${frame.className}>`);
    }
  }
  return { faint: [...new Set(faint)], wide: [...new Set(wide)], texts };
}
