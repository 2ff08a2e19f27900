// Package usage owns what a malformed command line is told: one class of error,
// errdefs.ErrInvalidArgument, whatever is wrong with it, from every command of a tree.
// It must not know any command.
package usage

import (
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"
)

// Error is a mistake in a command line; it is an errdefs.ErrInvalidArgument.
type Error struct{ text string }

func (e *Error) Error() string        { return e.text }
func (e *Error) Is(target error) bool { return target == errdefs.ErrInvalidArgument }

// Strict makes all commands below and including root refuse unknown flags, unknown
// subcommands and wrong numbers of arguments with an Error. Cobra's own errors for
// these have no class, and groups of commands would print their help and succeed.
func Strict(root *cobra.Command) {
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return &Error{err.Error()} })
	strict(root)
}

func strict(cmd *cobra.Command) {
	for _, sub := range cmd.Commands() {
		strict(sub)
	}
	if cmd.HasSubCommands() && !cmd.Runnable() {
		cmd.Args, cmd.RunE = cobra.ArbitraryArgs, group
		return
	}
	if check := cmd.Args; check != nil {
		cmd.Args = func(cmd *cobra.Command, args []string) error {
			err := check(cmd, args)
			if err == nil || errdefs.IsInvalidArgument(err) {
				return err
			}
			return &Error{err.Error()}
		}
	}
}

// group is what a command does that only holds others.
func group(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return cmd.Help()
	}
	text := fmt.Sprintf("unknown command %q for %q", args[0], cmd.CommandPath())
	if like := cmd.SuggestionsFor(args[0]); len(like) > 0 {
		text += "; did you mean " + strings.Join(like, " or ") + "?"
	}
	return &Error{text}
}

// OneOf checks a flag that takes one of some words.
func OneOf(flag, value string, words ...string) error {
	if slices.Contains(words, value) {
		return nil
	}
	return &Error{fmt.Sprintf("%s %q: want %s", flag, value, strings.Join(words, " or "))}
}
