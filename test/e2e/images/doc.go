// Package images loads images that are hard to unpack into a node and looks at them from
// within a Pod's VM: many layers, big ones, hard links, attributes, whiteouts, broken
// archives; and pulls images that came along.
package images
