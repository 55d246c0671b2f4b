from __future__ import annotations

from launch.report.html import fragment, html_page, tag


def test_text_and_attributes_are_escaped_and_safe_html_is_kept() -> None:
    inner = tag("b", "<script>")
    assert inner == "<b>&lt;script&gt;</b>"
    assert tag("p", inner, " & more", class_='"x"') == '<p class="&quot;x&quot;"><b>&lt;script&gt;</b> &amp; more</p>'
    assert fragment("<i>", inner) == "&lt;i&gt;<b>&lt;script&gt;</b>"


def test_attribute_names_use_hyphens_and_void_elements_have_no_end_tag() -> None:
    assert tag("img", src="a.png", aria_label="image") == '<img src="a.png" aria-label="image">'


def test_a_page_escapes_its_title_and_forbids_requests() -> None:
    page = html_page("<title>", tag("p", "text"), style=".x{}")
    assert "<title>&lt;title&gt;</title>" in page
    assert "default-src &#x27;none&#x27;" in page
    assert ".x{}" in page
