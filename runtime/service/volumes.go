package service

import (
	"context"

	volumeapi "github.com/hypernetes/hypernetes/api/volume/v1"
)

// volumeService answers the node's volume plugin.
type volumeService struct{ *Service }

var _ volumeapi.VolumesService = (*volumeService)(nil)

// Stats implements volumeapi.VolumesService.
func (s *volumeService) Stats(ctx context.Context, r *volumeapi.StatsRequest) (*volumeapi.StatsResponse, error) {
	return s.sandbox.VolumeStats(ctx, r.Key)
}

// Grow implements volumeapi.VolumesService.
func (s *volumeService) Grow(ctx context.Context, r *volumeapi.GrowRequest) (*volumeapi.GrowResponse, error) {
	size, err := s.sandbox.GrowVolume(ctx, r.Key, r.SizeBytes)
	if err != nil {
		return nil, err
	}
	return &volumeapi.GrowResponse{DeviceBytes: uint64(size)}, nil
}

// Throttle implements volumeapi.VolumesService.
func (s *volumeService) Throttle(ctx context.Context, r *volumeapi.ThrottleRequest) (*volumeapi.ThrottleResponse, error) {
	if err := s.sandbox.ThrottleVolume(ctx, r.Key); err != nil {
		return nil, err
	}
	return &volumeapi.ThrottleResponse{}, nil
}
