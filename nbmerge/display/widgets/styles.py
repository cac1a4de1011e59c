"""How explorers look: one style, by JupyterLab's variables where there are any."""

from __future__ import annotations

_INK, _LINE = "var(--jp-content-font-color1,inherit)", "var(--jp-border-color2,rgba(128,128,128,.35))"
_FOCUS = "2px solid rgb(76,139,245)"
_HERE = ".nbm-keyed:focus-within"

STYLE = f"""<style>
.nbm-explore,.nbm-explore .widget-box{{max-width:100%;min-width:0}}
.nbm-explore .widget-html{{min-width:0}}
.nbm-explore .widget-html-content{{line-height:1.45;white-space:normal;min-width:0}}
.nbm-explore :focus-visible{{outline:{_FOCUS}!important;outline-offset:1px}}
.nbm-bar{{position:relative;gap:4px 16px;overflow:visible;align-items:center}}
.nbm-bar>*,.nbm-bar .nbm-keyed>*{{margin:0}}
.nbm-keyed{{position:relative;overflow:visible}}
.nbm-keys{{position:absolute;left:8px;top:50%;width:1px;height:1px;margin:0;opacity:0;overflow:hidden;pointer-events:none}}
{_HERE} select,{_HERE} .noUi-touch-area{{outline:{_FOCUS};outline-offset:1px}}
.nbm-table{{display:block;overflow-x:auto;border:1px solid {_LINE};margin:2px 0}}
.nbm-explore .nbm-rows{{width:max-content;min-width:100%;max-width:none;overflow:visible}}
.nbm-rows>*{{font-family:var(--jp-code-font-family,monospace);font-size:13px;line-height:20px;margin:0;height:20px}}
.nbm-heads .widget-html-content{{white-space:pre;line-height:20px;padding:0 8px;font-weight:bold}}
.nbm-rows .nbm-heads{{height:22px;border-bottom:1px solid {_LINE}}}
.nbm-row.jupyter-button{{display:block;width:auto;padding:0 8px;text-align:left;white-space:pre;overflow:visible}}
.nbm-row.jupyter-button{{background:none;color:{_INK};box-shadow:none;border:0}}
.nbm-row.jupyter-button:disabled{{visibility:hidden}}
.nbm-row.jupyter-button:hover{{background:var(--jp-layout-color2,rgba(128,128,128,.12));box-shadow:none}}
.nbm-row.nbm-on.jupyter-button{{background:rgba(76,139,245,.28);box-shadow:inset 3px 0 rgb(76,139,245)}}
.nbm-explore:has(.nbm-to-rows input:focus) .nbm-row.nbm-on{{outline:{_FOCUS};outline-offset:-2px}}
.nbm-side details{{display:inline-block;vertical-align:top;margin-right:40px!important;max-width:100%}}
.nbm-explore .noUi-handle{{visibility:hidden}}
.nbm-explore .noUi-touch-area{{visibility:visible;box-sizing:border-box;border-radius:50%;border:1px solid {_LINE}}}
.nbm-explore .noUi-touch-area{{background:rgb(76,139,245);cursor:pointer}}
</style>"""
